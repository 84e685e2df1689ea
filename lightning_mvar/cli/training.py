"""LightningCLI of the training commands: resuming, saved configurations, and options that override checkpoints."""

from __future__ import annotations

import sys
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mvar.callbacks import InterruptionCallback, StepProgressBar
from lightning_mvar.callbacks.overview import OverviewCallback
from lightning_mvar.checkpoints.training import NETWORK_KEY, check_intact, read_plain_part, resolve_last
from lightning_mvar.cli.arguments import find_input_error
from lightning_mvar.cli.configs import PARSER_MODE, find_configs, parse, run_folder
from lightning_mvar.cli.help import START_HELP, TF32_HELP
from lightning_mvar.cli.ranks import stop_ranks_on_error
from lightning_mvar.cli.rendezvous import fail_together
from lightning_mvar.cli.starting import RunFolders, StartOptions
from lightning_mvar.devices import set_tf32
from lightning_mvar.errors import RESUME_REMEDY, InputError, one_line, require_in
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.lightning_internals import restore_choice_of_rank_zero
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.run_state import check_run_state
from lightning_mvar.training.strategies import FSDP2Strategy

CLI = TypeVar("CLI", bound="TrainingCLI")

PARSERS: dict[tuple[object, ...], LightningArgumentParser] = {}  # by module, datamodule and command
MAX_SEED = 2**32 - 1
MIN_VALUES = {  # lower bounds of the trainer's options that Lightning does not check
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,  # all
}
SILENCED = (  # how warnings about something intended or harmless begin
    "LightningCLI's args parameter",  # argv comes from `main`
    r"\s*Unable to serialize instance",  # it is left out of the saved file
    ".*LeafSpec.*is deprecated",  # raised by Lightning itself
    "The `srun` command is available",  # a single process does not need it; docs/devices.md shows how to use it
    "The '.*_dataloader' does not have many workers",  # token shards need none
    "Checkpoint directory .* exists and is not empty",  # only if a run resumes: `RunFolders` refuses others
    "This DataLoader will create",  # more workers than cores, because workers also wait for files
)


class TrainingCLI(LightningCLI):
    """LightningCLI of one training command, `fit`, `validate` or `test`.

    All three have the same options, so each accepts the file that `fit` saves. Without `trainer.default_root_dir`, the
    run's folder is named after the configuration files; see `run_folder`.

    Args:
        argv: command line, starting with the name of the command.
        options: see LightningCLI.
    """

    module: ClassVar[type[L.LightningModule]] = LitMVAR
    data: ClassVar[type[L.LightningDataModule]] = TokenDataModule
    folders: ClassVar[type[RunFolders]] = RunFolders
    checkpoint_key = NETWORK_KEY  # entry that identifies checkpoints of this command

    def __init__(self, argv: list[str], **options: Any) -> None:
        self.command = argv[0]
        arguments, self.files = find_configs(argv[1:])
        self.written: Namespace  # configuration with unresolved interpolations
        super().__init__(self.module, self.data, args=arguments, run=False, **options)

    @property
    def training(self) -> bool:
        return self.command not in ("validate", "test")

    def setup_parser(self, *arguments: Any) -> None:
        """Builds each parser once per process: a sweep parses the command lines of all its variants."""
        key = (self.module, self.data, self.command)
        if key not in PARSERS:
            super().setup_parser(*arguments)
            PARSERS[key] = self.parser
        self.parser = PARSERS[key]
        self.parser.set_defaults({"trainer.default_root_dir": run_folder(self.command, self.files)})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--tf32", type=bool, default=False, help=TF32_HELP)
        use = "resume from" if self.training else "score"
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=f"checkpoint to {use}")
        for name, text in START_HELP.items():  # hidden in `validate` and `test`, which accept files printed by `fit`
            parser.add_argument(f"--{name}", action="store_true", help=text if self.training else SUPPRESS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.written, self.config = parse(parser, args)
        require_in(f"[0, {MAX_SEED}]", "--", seed_everything=self.config.seed_everything)
        check_trainer_options(self.config.trainer)

    def before_instantiate_classes(self) -> None:
        """Prepares the configuration to save, with the seed in use and without the options for starting the run."""
        set_tf32(self.config.tf32)
        saved = self.written.clone()
        saved.seed_everything = self.config.seed_everything
        for name in ("ckpt_path", *StartOptions._fields):
            del saved[name]
        self.save_config_kwargs = {"yaml": self.parser.dump(saved, skip_unset=False, skip_validation=True)}

    def instantiate_classes(self) -> None:
        """Builds the objects.

        Raises:
            InputError: if Lightning, or a class that an option names, rejects its arguments.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            if (input_error := find_input_error(error)) is None and is_bug(error):
                raise
            raise input_error or InputError(one_line(error)) from error
        self.run_folders = self.folders(self.trainer)

    def instantiate_trainer(self, **options: Any) -> L.Trainer:
        given = self.config_init.trainer.callbacks or []
        chosen = [*given] if isinstance(given, list) else [given]  # the trainer adds its own bar to the list
        trainer = super().instantiate_trainer(**options)
        replace_default_progress_bar(trainer, chosen)
        return trainer

    def run_trainer(self) -> None:
        """Trains, or scores a checkpoint."""
        with ExitStack() as stack:
            with fail_together(self.trainer.strategy):
                if self.training:
                    stack.enter_context(self.run_folders.locked(self.command))
                ckpt_path = self.choose_checkpoint()
                if ckpt_path is None and not self.training and getattr(self.model, "weights", None) is None:
                    raise InputError(f"{self.command} needs --ckpt_path: without it the network is untrained")
            run = getattr(self.trainer, "fit" if self.training else self.command)
            trainer = self.trainer
            with stop_ranks_on_error(trainer.strategy, RESUME_REMEDY, lambda: f" after step {trainer.global_step}"):
                run(self.model, datamodule=self.datamodule, ckpt_path=ckpt_path)
                self.finish()

    def finish(self) -> None:
        """Hook that runs after the trainer has finished, while the folders are still locked."""

    def choose_checkpoint(self) -> str | None:
        """Returns the checkpoint to continue from, if any; with --overwrite, schedules the removal of an earlier run.

        Only rank 0 searches for the newest checkpoint and verifies it; all ranks restore its choice, because their file
        systems may differ.

        Raises:
            InputError: if the checkpoint cannot be read, is not from this command, or does not suit the strategy; or if
                a new run would write to the folders of an earlier one.
        """
        ckpt_path, start = self.config.ckpt_path, StartOptions.from_namespace(self.config)
        if start.resume and ckpt_path is not None:
            raise InputError("give --resume or --ckpt_path, not both")
        if start.verify and not start.resume and ckpt_path is None:
            raise InputError("`--verify` needs --resume or --ckpt_path")
        restore_choice_of_rank_zero(self.trainer)
        if start.resume and self.trainer.is_global_zero:
            ckpt_path = self.run_folders.newest_checkpoint(start.verify)
        elif ckpt_path is not None:
            ckpt_path = str(resolve_last(Path(ckpt_path)))
            if start.verify and self.trainer.is_global_zero:
                check_intact(Path(ckpt_path), verify_checksums=True)
        if self.training and self.run_folders.writes:
            if start.overwrite:
                self.run_folders.replace_earlier_run(ckpt_path)
            else:
                self.run_folders.refuse_earlier_run(ckpt_path, start.resume)
        if ckpt_path is not None:
            self.check_checkpoint(ckpt_path)
        return ckpt_path

    def check_checkpoint(self, ckpt_path: str) -> None:
        """Raises InputError unless a checkpoint is from this command and fits the configuration and strategy."""
        content = read_plain_part(Path(ckpt_path))
        if self.checkpoint_key not in content:
            remedy = "; to start from its weights, give it to --model.weights" if self.training else ""
            raise InputError(f"--ckpt_path {ckpt_path} is not a checkpoint of this command{remedy}")
        if self.training and "callbacks" not in content:
            raise InputError(f"--ckpt_path {ckpt_path} holds weights only, not the state of a run to continue")
        if Path(ckpt_path).is_dir() and not isinstance(self.trainer.strategy, FSDP2Strategy):
            raise InputError(
                f"--ckpt_path {ckpt_path} is sharded: it needs --trainer.strategy fsdp2, on any number of devices; "
                f"`lightning-mvar export` writes its weights to one folder"
            )
        self.model.check_checkpoint(content[self.checkpoint_key])
        loop = "fit_loop" if self.training else f"{self.command}_loop"
        check_run_state(content, self.trainer, loop, Path(ckpt_path).is_dir(), f"--ckpt_path {ckpt_path}")


def check_trainer_options(trainer: Namespace) -> None:
    """Raises InputError for invalid options of the trainer that Lightning accepts."""
    for name, minimum in MIN_VALUES.items():
        require_in(f"[{minimum}, inf)", "--trainer.", **{name: trainer[name]})
    if trainer.val_check_interval == 0:
        raise InputError(
            "--trainer.val_check_interval must be positive; to disable validation, use --trainer.limit_val_batches 0"
        )
    strategy = trainer.strategy.class_path if isinstance(trainer.strategy, Namespace) else trainer.strategy
    if strategy.rpartition(".")[2] in ("fsdp", "fsdp_cpu_offload", "FSDPStrategy"):
        raise InputError(f"--trainer.strategy {strategy} (FSDP1) is not supported: use fsdp2")


class ParsedConfig(Exception):
    """Carries the parsed configuration out of LightningCLI before anything is built."""

    def __init__(self, config: Namespace) -> None:
        super().__init__()
        self.config = config


def parse_command(argv: list[str], cli: type[TrainingCLI] = TrainingCLI) -> Namespace:
    """Parses and validates a training command line, command name included, without building anything.

    Raises:
        argparse.ArgumentError: if it does not parse.
        InputError: if a value is invalid.
    """

    class Parsing(cli):  # type: ignore[misc,valid-type]
        def before_instantiate_classes(self) -> None:
            raise ParsedConfig(self.config)

    try:
        run_cli(Parsing, argv)
    except ParsedConfig as parsed:
        return parsed.config
    raise AssertionError("a command line was neither parsed nor refused")


def replace_default_progress_bar(trainer: L.Trainer, chosen: Sequence[Callback]) -> None:
    """Replaces Lightning's progress bar unless it is one of the callbacks that the user has chosen.

    It cannot be a default callback, because Lightning refuses a second bar, and any bar with
    --trainer.enable_progress_bar false.
    """
    bar = trainer.progress_bar_callback
    if bar is not None and bar not in chosen:
        steps = StepProgressBar(refresh_rate=1 if sys.stdout.isatty() else 10)
        trainer.callbacks[trainer.callbacks.index(bar)] = steps  # type: ignore[attr-defined]


def run_cli(cli: type[CLI], argv: list[str]) -> CLI:
    """Parses a command line, builds the objects and runs the command.

    Raises:
        argparse.ArgumentError: if the command line does not parse.
        InputError: if the requested devices or precision are unavailable, or a class named by an option rejects its
            arguments.
        Interrupted: if a signal ended the run.
    """
    for message in SILENCED:
        warnings.filterwarnings("ignore", message)
    try:
        built = cli(
            argv,
            parser_kwargs={"parser_mode": PARSER_MODE, "exit_on_error": False, "prog": f"lightning-mvar {argv[0]}"},
            save_config_callback=OverviewCallback,
            trainer_defaults={"callbacks": [InterruptionCallback()], "enable_model_summary": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
        )
        built.run_trainer()
    except (ValueError, MisconfigurationException) as error:
        if isinstance(error, InputError) or not raised_by_lightning(error):
            raise
        raise InputError(one_line(error)) from error
    return built


def raised_by_lightning(error: BaseException) -> bool:
    """Returns whether Lightning's own code raised an exception, rather than code that it called."""
    return modules_of(error)[-1].startswith("lightning.")


def is_bug(error: BaseException) -> bool:
    """Returns whether an exception is a bug in a class of this package, rather than caused by its arguments."""
    while error.__cause__ is not None:  # jsonargparse wraps exceptions
        error = error.__cause__
    modules = modules_of(error)
    builders = [i for i, name in enumerate(modules) if name.startswith(("jsonargparse.", "lightning.pytorch.cli"))]
    built = modules[builders[-1] + 1 :] if builders else modules
    return any(name.startswith("lightning_mvar.") for name in built) and not raised_by_lightning(error)


def modules_of(error: BaseException) -> list[str]:
    """Returns the modules of an exception's traceback; the last one raised it."""
    return [str(frame.f_globals["__name__"]) for frame, _ in traceback.walk_tb(error.__traceback__)]
