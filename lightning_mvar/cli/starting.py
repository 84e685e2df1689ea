"""Start of a training run: locks its folders, and resumes, replaces or refuses an earlier run in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_mvar.callbacks import Checkpoint
from lightning_mvar.callbacks.checkpoint import AtomicCheckpoint
from lightning_mvar.checkpoints.training import LAST, newest_first, newest_intact, remove_checkpoint, step_of
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import create_folder
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.training.base import SKIPPED_STEPS

LOG_FILES = ("events.out.tfevents.*", "hparams.yaml")  # in the logger's folder; config.yaml is overwritten anyway


class StartOptions(NamedTuple):
    """How a training run starts if its folder holds an earlier one; all false for other commands."""

    resume: bool
    overwrite: bool
    verify: bool

    @classmethod
    def from_namespace(cls, options: Namespace) -> StartOptions:
        """Reads the options of a command; raises InputError if they contradict each other."""
        start = cls(*(bool(options.get(name, False)) for name in cls._fields))
        if start.resume and start.overwrite:
            raise InputError("give --resume or --overwrite, not both")
        return start


class RunFolders:
    """Folders that a run writes to: the trainer's root folder and those of loggers and checkpoints."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer, self.root = trainer, Path(trainer.default_root_dir)

    @contextmanager
    def locked(self, command: str) -> Iterator[None]:
        """Creates the folders and locks them against other commands; only rank 0 does so."""
        option = "--trainer.default_root_dir"
        root, folders = self.root.resolve(), self.checkpoints(AtomicCheckpoint)
        others = [folder for folder in folders if not folder.resolve().is_relative_to(root)]
        with ExitStack() as stack:
            if self.writes:
                for folder in [self.root, *dict.fromkeys(others)]:
                    stack.enter_context(lock_folder(folder, command, option))
                for folder in [*self.logs(), *folders]:
                    create_folder(folder, f"choose another {option}")
            yield

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of a run: rank 0, except with `fast_dev_run`, which writes nothing."""
        return self.trainer.is_global_zero and not self.trainer.fast_dev_run  # type: ignore[attr-defined]

    def logs(self) -> list[Path]:
        return [Path(logger.log_dir) for logger in self.trainer.loggers if logger.log_dir is not None]

    def checkpoints(self, kind: type[AtomicCheckpoint]) -> list[Path]:
        """Returns the folders that the trainer's checkpoint callbacks of type `kind` write to."""
        callbacks = self.trainer.checkpoint_callbacks
        return [Path(str(callback.dirpath)) for callback in callbacks if isinstance(callback, kind)]

    def is_own(self, ckpt_path: str | None) -> bool:
        """Returns whether a checkpoint is in a folder that this run writes to."""
        folders = [folder.resolve() for folder in self.checkpoints(AtomicCheckpoint)]
        return ckpt_path is not None and Path(ckpt_path).resolve().parent in folders

    def refuse_earlier_run(self, ckpt_path: str | None, resume: bool) -> None:
        """Raises InputError if a new run would add to, or remove from, the checkpoints of an earlier run.

        A run from the newest checkpoint in its own folder continues the earlier run. So does one with --resume, even if
        all checkpoints in the folder are damaged.
        """
        occupied = [folder for folder in self.checkpoints(AtomicCheckpoint) if newest_first(folder)]
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

    def replace_earlier_run(self, ckpt_path: str | None) -> None:
        """Schedules the removal of an earlier run from the folders right before the first step.

        Until then, an error in the checkpoint to start from, the data or the model leaves the earlier run intact.
        """
        if self.is_own(ckpt_path):
            raise InputError(f"--overwrite would remove --ckpt_path {ckpt_path}: choose another folder for the new run")
        logs = [path for folder in self.logs() for pattern in LOG_FILES for path in folder.glob(pattern)]
        self.trainer.callbacks.append(  # type: ignore[attr-defined]
            LambdaCallback(on_train_start=lambda trainer, module: self.remove_earlier_run(logs))
        )

    def remove_earlier_run(self, logs: list[Path]) -> None:
        """Removes checkpoints and `logs` of an earlier run, and nothing else, from the folders of this run."""
        for folder in self.checkpoints(AtomicCheckpoint):
            (folder / LAST).unlink(missing_ok=True)
            for path in newest_first(folder):
                remove_checkpoint(path)
        for path in logs:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.root / SKIPPED_STEPS, ignore_errors=True)

    def newest_checkpoint(self, verify_checksums: bool) -> str | None:
        folders = self.checkpoints(Checkpoint)
        if not folders:
            raise InputError("--resume needs a lightning_mvar.callbacks.Checkpoint among the trainer's callbacks")
        newest = newest_intact(folders[0], verify_checksums)
        rank_zero_info(
            f"resuming from {newest}"
            if newest
            else f"--resume: no intact checkpoint in {folders[0]}, starting from scratch"
        )
        return None if newest is None else str(newest)
