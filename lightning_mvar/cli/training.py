"""LightningCLI of the training commands: resuming, and options that take precedence over checkpoints."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning as L
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_mvar.callbacks import Checkpoint, InterruptionCallback
from lightning_mvar.callbacks.checkpoint import AtomicCheckpoint
from lightning_mvar.callbacks.overview import OverviewCallback
from lightning_mvar.checkpoints.training import (
    LAST,
    NETWORK_KEY,
    check_intact,
    newest_first,
    newest_intact,
    read_plain_part,
    remove_checkpoint,
    resolve_last,
    step_of,
)
from lightning_mvar.cli.arguments import find_input_error
from lightning_mvar.cli.ranks import stop_ranks_on_error
from lightning_mvar.errors import RESUME_REMEDY, InputError
from lightning_mvar.io.files import create_folder
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.training.base import SKIPPED_STEPS
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.lightning_internals import CommandHooks, restore_choice_of_rank_zero
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.strategies import FSDP2Strategy

CLI = TypeVar("CLI", bound=LightningCLI)

LOG_FILES = ("events.out.tfevents.*", "config.yaml", "hparams.yaml")  # of a run, in the folder of its logger

# Interpolation sees all --config files and the overrides after them; its keys are relative to the subcommand.
PARSER = {"parser_mode": "omegaconf+", "exit_on_error": False}
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class TrainingCLI(CommandHooks):
    """LightningCLI whose command line takes precedence over the hyperparameters in a checkpoint."""

    checkpoint_key = NETWORK_KEY  # entry that checkpoints of this command have

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.command = options["args"][:1]
        super().__init__(*arguments, **options)

    def add_options(self, parser: LightningArgumentParser, command: str) -> None:
        if command == "fit":
            add_start_options(parser)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:  # a combination that Lightning does not support
            raise InputError(" ".join(str(error).split())) from error
        if isinstance(trainer.strategy, FSDPStrategy):
            raise InputError("--trainer.strategy fsdp (FSDP1) is not supported: use fsdp2")
        if not sys.stdout.isatty():
            replace_rich_progress_bar(trainer)
        return trainer

    def run_command(self, command: str) -> None:
        options, training = self.config_init[command], command == "fit"
        with self.own_folders(command) if training else nullcontext():
            options["ckpt_path"] = self.choose_checkpoint(options, training)
            if options["ckpt_path"] is None and not training:
                raise InputError(f"{command} needs --ckpt_path: without it the network is untrained")
            with stop_trainer_ranks_on_error(self.trainer):
                super().run_command(command)

    @contextmanager
    def own_folders(self, command: str) -> Iterator[None]:
        """Creates the folders of a training run and keeps other commands out; rank 0 does so for all ranks."""
        root, option = Path(self.trainer.default_root_dir), "--trainer.default_root_dir"
        others = [folder for folder in self.folders(AtomicCheckpoint) if not is_inside(folder, root)]
        with ExitStack() as stack:
            if self.writes_run:
                for folder in [root, *dict.fromkeys(others)]:
                    stack.enter_context(lock_folder(folder, command, option))
                for folder in [*self.log_folders(), *self.folders(AtomicCheckpoint)]:
                    create_folder(folder, f"choose another {option}")
            yield

    @property
    def writes_run(self) -> bool:
        """Whether this process writes the files of a run: rank 0, unless it is a test run that writes nothing."""
        return self.trainer.is_global_zero and not self.trainer.fast_dev_run  # type: ignore[attr-defined]

    def choose_checkpoint(self, options: Namespace, training: bool) -> str | None:
        """Returns the checkpoint to continue from, if any, and removes an earlier run if --overwrite is given.

        Rank 0 alone looks for the newest one, and all ranks restore what it has found: their file systems may differ.

        Raises:
            InputError: if it cannot be read, is not of this command, or does not suit the strategy; or if a new run
                would write to the folders of an earlier one.
        """
        ckpt_path, start = options["ckpt_path"], StartOptions.of(options)
        if start.resume and ckpt_path is not None:
            raise InputError("give --resume or --ckpt_path, not both")
        restore_choice_of_rank_zero(self.trainer)
        if start.resume and self.trainer.is_global_zero:
            ckpt_path = self.newest_checkpoint(start.verify)
        elif ckpt_path is not None:
            ckpt_path = str(resolve_last(Path(ckpt_path)))
            if start.verify:
                check_intact(Path(ckpt_path), verify_checksums=True)
        if training and self.writes_run:
            if start.overwrite:
                self.remove_run(ckpt_path)
            self.refuse_other_runs(ckpt_path, start.resume)
        if ckpt_path is not None:
            self.check_checkpoint(ckpt_path, training)
        return ckpt_path

    def check_checkpoint(self, ckpt_path: str, training: bool) -> None:
        """Raises InputError unless a checkpoint is of this command and configuration and fits the strategy."""
        content = read_plain_part(Path(ckpt_path))
        if self.checkpoint_key not in content:
            raise InputError(f"--ckpt_path {ckpt_path} is not a checkpoint of this command")
        if training and "callbacks" not in content:
            raise InputError(f"--ckpt_path {ckpt_path} holds weights only, not the state of a run to continue")
        if Path(ckpt_path).is_dir() and not isinstance(self.trainer.strategy, FSDP2Strategy):
            raise InputError(
                f"--ckpt_path {ckpt_path} is sharded: it needs --trainer.strategy fsdp2, on any number of devices; "
                f"`lightning-mvar export` writes its weights to one folder"
            )
        self.model.check_checkpoint(content[self.checkpoint_key])

    def log_folders(self) -> list[Path]:
        return [Path(logger.log_dir) for logger in self.trainer.loggers if logger.log_dir is not None]

    def folders(self, kind: type[AtomicCheckpoint]) -> list[Path]:
        """Returns the folders that the trainer's checkpoint callbacks of type `kind` write to."""
        callbacks = self.trainer.checkpoint_callbacks
        return [Path(str(callback.dirpath)) for callback in callbacks if isinstance(callback, kind)]

    def is_own(self, ckpt_path: str | None) -> bool:
        """Whether a checkpoint lies in a folder that this run writes to."""
        folders = [folder.resolve() for folder in self.folders(AtomicCheckpoint)]
        return ckpt_path is not None and Path(ckpt_path).resolve().parent in folders

    def refuse_other_runs(self, ckpt_path: str | None, resume: bool) -> None:
        """Raises InputError if a new run would write to, and remove from, the checkpoints of an earlier run.

        A run that starts from the newest checkpoint in its own folder continues that run, and so does one with
        --resume, whose folder may hold damaged checkpoints alone.
        """
        occupied = [folder for folder in self.folders(AtomicCheckpoint) if newest_first(folder)]
        if resume or not occupied:
            return
        if not self.is_own(ckpt_path):
            raise InputError(
                f"{occupied[0]} holds the checkpoints of an earlier run: continue it with --resume, replace it with "
                f"--overwrite, or choose another --trainer.default_root_dir for a new one"
            )
        newest = newest_first(Path(str(ckpt_path)).parent)[0]
        if step_of(newest) > step_of(Path(str(ckpt_path))):
            raise InputError(
                f"a run from {ckpt_path} would remove later checkpoints, up to {newest}: choose another "
                f"--trainer.default_root_dir for it, or continue from the newest with --resume"
            )

    def remove_run(self, ckpt_path: str | None) -> None:
        """Removes checkpoints and logs of an earlier run, and nothing else, from the folders of this run."""
        if self.is_own(ckpt_path):
            raise InputError(f"--overwrite would remove --ckpt_path {ckpt_path}: choose another folder for the new run")
        for folder in self.folders(AtomicCheckpoint):
            (folder / LAST).unlink(missing_ok=True)
            for path in newest_first(folder):
                remove_checkpoint(path)
        for path in [path for logs in self.log_folders() for pattern in LOG_FILES for path in logs.glob(pattern)]:
            path.unlink()
        shutil.rmtree(Path(self.trainer.default_root_dir) / SKIPPED_STEPS, ignore_errors=True)

    def newest_checkpoint(self, verify_checksums: bool) -> str | None:
        folders = self.folders(Checkpoint)
        if not folders:
            raise InputError("--resume needs a lightning_mvar.callbacks.Checkpoint among the trainer's callbacks")
        newest = newest_intact(folders[0], verify_checksums)
        rank_zero_info(
            f"resuming from {newest}"
            if newest
            else f"--resume: no intact checkpoint in {folders[0]}, starting from scratch"
        )
        return None if newest is None else str(newest)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Returns the requested subcommand only: building the parsers of the others would take as long."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in self.command}


class ParsedConfig(Exception):
    """Carries the parsed configuration out of LightningCLI before anything is built."""

    def __init__(self, config: Namespace) -> None:
        super().__init__()
        self.config = config


class ParsingCLI(TrainingCLI):
    """TrainingCLI that parses and validates, then raises ParsedConfig instead of building."""

    def parse_arguments(self, *args: Any) -> None:
        super().parse_arguments(*args)
        raise ParsedConfig(self.config)


def parse_fit(argv: list[str]) -> Namespace:
    """Parses and validates a command line of `fit`, command name included, without building anything.

    Raises:
        argparse.ArgumentError: if it does not parse.
    """
    try:
        run_cli(ParsingCLI, LitMVAR, TokenDataModule, args=argv)
    except ParsedConfig as parsed:
        return parsed.config[argv[0]]
    raise AssertionError("a command line was neither parsed nor refused")


def replace_rich_progress_bar(trainer: L.Trainer) -> None:
    """Replaces Rich's progress bar, Lightning's default, by tqdm's: Rich writes nothing to a file until it ends."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        trainer.callbacks[trainer.callbacks.index(bar)] = TQDMProgressBar(refresh_rate=10)  # type: ignore[attr-defined]


class StartOptions(NamedTuple):
    """How a training run starts if its folder holds an earlier one; all false for other commands."""

    resume: bool
    overwrite: bool
    verify: bool

    @classmethod
    def of(cls, options: Namespace) -> StartOptions:
        """Reads the options of a command; raises InputError if they exclude each other."""
        start = cls(*(bool(options.get(name, False)) for name in cls._fields))
        if start.resume and start.overwrite:
            raise InputError("give --resume or --overwrite, not both")
        return start


def add_start_options(parser: LightningArgumentParser) -> None:
    """Adds the options of `StartOptions`."""
    helps = {
        "resume": "continue from the newest complete checkpoint of this run; start from scratch if it has none",
        "overwrite": "remove the checkpoints and logs of an earlier run in the same folder, and start from scratch",
        "verify": "read the checkpoint completely before continuing from it, and compare its checksums",
    }
    for name, text in helps.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)


def is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def stop_trainer_ranks_on_error(trainer: L.Trainer) -> AbstractContextManager[None]:
    """Returns a context to run the trainer in; see `stop_ranks_on_error`."""
    return stop_ranks_on_error(trainer.strategy, RESUME_REMEDY, lambda: f" after step {trainer.global_step}")


def run_cli(cli: type[CLI], model: type, data: type, **options: Any) -> CLI:
    """Parses a command line, builds the objects and runs the command.

    Raises:
        InputError: if the requested devices or precision are unavailable, or a class named by an option rejects its
            arguments.
        Interrupted: if a signal ended the run.
    """
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # intended: argv comes from `main`
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")  # raised by Lightning itself
    try:
        return cli(
            model,
            data,
            parser_kwargs=PARSER,
            save_config_callback=OverviewCallback,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [InterruptionCallback()]},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            **options,
        )
    except MisconfigurationException as error:
        raise InputError(" ".join(str(error).split())) from error
    except ValueError as error:
        input_error = find_input_error(error)
        raise error if input_error is None else input_error from None
