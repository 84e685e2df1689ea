"""LightningCLI as the training commands use it: resuming, refusing, overrides that win over checkpoints."""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

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
from lightning_mvar.checkpoints.training import NETWORK_KEY, by_time, newest_intact, read_plain_part
from lightning_mvar.cli.arguments import behind
from lightning_mvar.cli.ranks import ending_together
from lightning_mvar.errors import InputError
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.lightning_internals import CommandHooks
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.strategies import FSDP2Strategy

CLI = TypeVar("CLI", bound=LightningCLI)

# Interpolation that sees every --config file and the overrides after them, with keys relative to the subcommand.
PARSER = {"parser_mode": "omegaconf+", "exit_on_error": False}
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class TrainingCLI(CommandHooks):
    """LightningCLI whose command line always wins over what a checkpoint remembers."""

    checkpoint_key = NETWORK_KEY  # what a checkpoint of this command holds

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.command = options["args"][:1]
        super().__init__(*arguments, **options)

    def add_options(self, parser: LightningArgumentParser, command: str) -> None:
        if command == "fit":
            add_resume(parser)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:  # settings that Lightning does not combine
            raise InputError(" ".join(str(error).split())) from error
        if isinstance(trainer.strategy, FSDPStrategy):
            raise InputError("--trainer.strategy fsdp is PyTorch's first FSDP, which is not supported: use fsdp2")
        if not sys.stdout.isatty():
            show_progress_in_files(trainer)
        return trainer

    def run_command(self, command: str) -> None:
        options = self.config_init[command]
        training = command == "fit"
        options["ckpt_path"] = self.choose_checkpoint(options["ckpt_path"], options.get("resume", False), training)
        if options["ckpt_path"] is None and not training:
            raise InputError(f"{command} needs --ckpt_path: without it the network is untrained")
        with together(self.trainer):
            super().run_command(command)

    def choose_checkpoint(self, ckpt_path: str | None, resume: bool, training: bool) -> str | None:
        """The checkpoint to go on from, if any.

        Raises:
            InputError: if it cannot be read, is of something else, or not for this strategy.
        """
        if resume:
            if ckpt_path is not None:
                raise InputError("give --resume or --ckpt_path, not both")
            ckpt_path = self.newest_checkpoint()
        elif training:
            self.refuse_other_runs(ckpt_path)
        if ckpt_path is None:
            return None
        content = read_plain_part(Path(ckpt_path))
        if self.checkpoint_key not in content:
            raise InputError(f"--ckpt_path {ckpt_path} is not a checkpoint of this command")
        if training and "callbacks" not in content:
            raise InputError(f"--ckpt_path {ckpt_path} holds weights only, not the state of a run to go on with")
        if Path(ckpt_path).is_dir() and not isinstance(self.trainer.strategy, FSDP2Strategy):
            raise InputError(
                f"--ckpt_path {ckpt_path} has a share of each rank: it needs --trainer.strategy fsdp2, on any number "
                f"of devices; `lightning-mvar export` makes one folder of its weights"
            )
        self.model.check_checkpoint(content[self.checkpoint_key])
        return ckpt_path

    def folders(self, kind: type[AtomicCheckpoint]) -> list[Path]:
        """Folders that the trainer's checkpoint callbacks of a kind write to."""
        callbacks = self.trainer.checkpoint_callbacks
        return [Path(str(callback.dirpath)) for callback in callbacks if isinstance(callback, kind)]

    def refuse_other_runs(self, ckpt_path: str | None) -> None:
        """Raise InputError if a new run would write, and remove, among the checkpoints of an earlier one.

        A run that starts from one of its own checkpoints goes on with it.
        """
        folders = self.folders(AtomicCheckpoint)
        if ckpt_path is not None and Path(ckpt_path).resolve().parent in [folder.resolve() for folder in folders]:
            return
        if occupied := [folder for folder in folders if by_time(folder)]:
            raise InputError(
                f"{occupied[0]} holds the checkpoints of an earlier run: continue it with --resume, or choose another "
                f"--trainer.default_root_dir for a new one"
            )

    def newest_checkpoint(self) -> str | None:
        folders = self.folders(Checkpoint)
        if not folders:
            raise InputError("--resume needs a lightning_mvar.callbacks.Checkpoint among the trainer's callbacks")
        newest = newest_intact(folders[0])
        rank_zero_info(
            f"resuming from {newest}" if newest else f"--resume: no intact checkpoint in {folders[0]}, starting anew"
        )
        return None if newest is None else str(newest)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for: parsers of the others would take as long to build, for nothing."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in self.command}


class Parsed(Exception):
    """Carries the configuration out of a command line that has parsed and would now build."""

    def __init__(self, config: Namespace) -> None:
        super().__init__()
        self.config = config


class ParsingCLI(TrainingCLI):
    """Parses, validates, and builds nothing."""

    def parse_arguments(self, *args: Any) -> None:
        super().parse_arguments(*args)
        raise Parsed(self.config)


def parsed_fit(words: list[str]) -> Namespace:
    """What a command line of `fit`, that word included, would build.

    Raises:
        argparse.ArgumentError: if it does not parse.
    """
    try:
        run_cli(ParsingCLI, LitMVAR, TokenDataModule, args=words)
    except Parsed as parsed:
        return parsed.config[words[0]]
    raise AssertionError("a command line was neither parsed nor refused")


def show_progress_in_files(trainer: L.Trainer) -> None:
    """Rich's progress bar, Lightning's choice where rich is installed, writes nothing to a file until it ends."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        trainer.callbacks[trainer.callbacks.index(bar)] = TQDMProgressBar(refresh_rate=10)  # type: ignore[attr-defined]


def add_resume(parser: LightningArgumentParser) -> None:
    text = "go on from the newest intact checkpoint of this run, or start where there is none yet"
    parser.add_argument("--resume", action="store_true", help=text)


def together(trainer: L.Trainer) -> AbstractContextManager[None]:
    """Run the trainer inside; see `ending_together`."""
    remedy = "--resume goes on from the newest checkpoint"
    return ending_together(trainer.strategy, remedy, lambda: f" after step {trainer.global_step}")


def run_cli(cli: type[CLI], model: type, data: type, **options: Any) -> CLI:
    """Parse, build and run.

    Raises:
        InputError: if this machine does not have the devices or the precision that are asked for, or what a class that
            an option names had to say of its arguments.
        Interrupted: if a signal ended the run.
    """
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # we pass on what the console script was given
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")  # Lightning's own
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
        mistake = behind(error)
        raise error if mistake is None else mistake from None
