"""Checkpoints that a run can be killed at any moment of writing, and that a resumed run continues from exactly."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.distributed.checkpoint import CheckpointException

from lightning_mvar.callbacks.tensorboard import writers
from lightning_mvar.checkpoints.training import Checksums, by_time, checksums, hidden, publish, remove, remove_leftovers
from lightning_mvar.errors import DivergedError, InputError, Interrupted
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.lightning_internals import CheckpointHooks, dump_checkpoint

# What Lightning keeps of a validation pass that was cut short in its first batch: it is run again from the start.
UNFINISHED_VALIDATION = {
    "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
    "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
    "is_last_batch": False,
}


class PlainFiles(TorchCheckpointIO):
    """Writes straight to the file; Lightning's own goes through memory and the folder for temporary files first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:  # given the path, torch would not say that the disk is full
            torch.save(checkpoint, file)


class AtomicCheckpoint(CheckpointHooks):
    """Lightning's ModelCheckpoint, whose files and folders get their name when they are complete and on the disk."""

    validation_unfinished = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = PlainFiles()
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(Path(str(self.dirpath)))

    def write(self, trainer: L.Trainer, path: Path) -> None:
        self.save(trainer, path, alone=False)

    def save(self, trainer: L.Trainer, path: Path, alone: bool) -> None:
        """Write a checkpoint: all ranks together, or this rank alone because the others cannot be reached.

        Raises:
            InputError: on all ranks, if one could not write.
        """
        checkpoint = dump_checkpoint(trainer, self.save_weights_only)
        self.settle(trainer, checkpoint["loops"]["fit_loop"])
        temporary = hidden(path, "unfinished")
        error: BaseException | None = None
        seal: Checksums = {}
        try:
            trainer.strategy.save_checkpoint(checkpoint, temporary)
        except (OSError, RuntimeError, CheckpointException) as caught:
            error = caught
        if not alone:
            self.agree(trainer, path, error)
            seal = self.collect_checksums(trainer, temporary)
            error = None
        try:
            if error is None and trainer.is_global_zero:
                publish(temporary, path, seal)
        except OSError as caught:
            error = caught
        if not alone:
            self.agree(trainer, path, error)
        elif error is not None:
            self.fail(trainer, path, error)
        self.mark_saved(trainer, path)

    def settle(self, trainer: L.Trainer, loop: dict[str, Any]) -> None:
        """Count what is complete only: a batch, the batches of a step, or a validation pass under way come again."""
        progress = loop["epoch_loop.batch_progress"]
        done = progress["current"]["processed"]
        progress["is_last_batch"] &= progress["current"]["ready"] == done  # told when the batch is fetched
        again = 0 if done >= trainer.num_training_batches else done % trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            counts |= dict.fromkeys(counts, counts["processed"] - again)
        if self.validation_unfinished:
            loop["epoch_loop.val_loop.batch_progress"] = UNFINISHED_VALIDATION

    def agree(self, trainer: L.Trainer, path: Path, error: BaseException | None) -> None:
        """Go on only if no rank has failed."""
        if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
            self.fail(trainer, path, error)

    def fail(self, trainer: L.Trainer, path: Path, error: BaseException | None) -> None:
        if trainer.is_global_zero:
            remove(hidden(path, "unfinished"))
        self.mark_saved(trainer)  # it would fail again
        reason = "see the message of another rank" if error is None else reason_of(error)
        raise InputError(
            f"cannot write the checkpoint {path} ({reason}); those before it are kept: make room, then go on with "
            f"--resume"
        ) from error

    def collect_checksums(self, trainer: L.Trainer, folder: Path) -> Checksums:
        """Of all files of a sharded checkpoint, each rank reading its part of them."""
        if not folder.is_dir():
            return {}
        parts: list[Checksums] = [{}] * trainer.world_size
        mine = checksums(folder, trainer.global_rank, trainer.world_size)
        dist.all_gather_object(parts, mine)
        return {name: found for part in parts for name, found in part.items()}

    def delete(self, trainer: L.Trainer, path: Path) -> None:
        if trainer.is_global_zero:
            remove(path)

    def link(self, trainer: L.Trainer, path: Path, link: Path) -> None:
        """Replaces the link in one step, without waiting for other ranks, which may be gone."""
        if not trainer.is_global_zero:
            return
        temporary = hidden(link, "link")
        try:
            temporary.symlink_to(path.name)
            os.replace(temporary, link)
        except OSError as error:
            raise InputError(f"cannot link {link} to the checkpoint {path} ({error.strerror})") from error


def reason_of(error: BaseException) -> str:
    """The system's words, where a library has wrapped them."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause = error.__cause__ or error.__context__ or error
    chosen = cause if isinstance(cause, OSError) else error
    return chosen.strerror if isinstance(chosen, OSError) and chosen.strerror else str(chosen).strip().splitlines()[0]


class Checkpoint(AtomicCheckpoint):
    """All of a run's state, every so many steps or minutes, at its end, and before a signal or an exception ends it.

    Written between two steps, when everything that belongs to the last one is logged and validated, so `--resume`
    continues as if nothing had happened. `last.ckpt` is a link to the newest.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: steps from one to the next.
        train_time_interval: time from one to the next instead, as `00:30:00`.
        keep: how many of the newest are kept; two or more, so that there is one to go back to.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        keep: int = 2,
    ) -> None:
        if (every_n_train_steps is None) == (train_time_interval is None):
            raise InputError("a Checkpoint needs either every_n_train_steps or train_time_interval")
        if keep < 1:
            raise InputError(f"a Checkpoint keeps at least 1, got keep {keep}")
        super().__init__(
            dirpath=dirpath,
            filename="{step:08d}",
            save_last="link",
            save_top_k=-1,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            enable_version_counter=False,
        )
        self.keep = keep
        self.intact: list[Path] = []  # those that were read or written in this run, the oldest first

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None:
            self.mark_saved(trainer)
            self.intact = [Path(trainer.ckpt_path).resolve()]
        forget_logged(trainer, trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save, where it is due after the step before."""
        super().on_train_batch_end(trainer, pl_module, None, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        """Not yet: the step is not logged, and not validated where that is due."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_unfinished = not trainer.sanity_checking

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_unfinished = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.needs_none(trainer):
            self.save_now(trainer, alone=False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what the last complete step left.

        An exception that is not the same on all ranks leaves them in the middle of talking to each other. Then rank 0
        saves alone if it has everything, that is unless the network is sharded.
        """
        assert isinstance(pl_module, ScheduledModule)
        useless = isinstance(exception, DivergedError | KeyboardInterrupt) or pl_module.stepping
        # After the last step, a run that goes on from there would not make up for the validation that was cut short.
        outside = trainer.global_step in (0, trainer.max_steps)
        if useless or outside or self.needs_none(trainer):
            return
        together = isinstance(exception, Interrupted) or trainer.world_size == 1
        whole = trainer.strategy.lightning_restore_optimizer  # False where each rank has a share
        if together or (whole and trainer.is_global_zero):
            self.save_now(trainer, alone=not together)
            rank_zero_info(f"saved {self.last_saved}; --resume goes on from there")

    def save_now(self, trainer: L.Trainer, alone: bool) -> None:
        path = self.name_now(trainer)
        self.best_model_path = path
        self.save(trainer, Path(path), alone)
        self.update_last(trainer)

    def save(self, trainer: L.Trainer, path: Path, alone: bool) -> None:
        for logger in trainer.loggers:  # what is logged before a checkpoint must not be lost after it
            logger.save()
        super().save(trainer, path, alone)
        self.intact = [*self.intact, path.resolve()][-self.keep :]
        if trainer.is_global_zero and len(self.intact) == self.keep:
            for other in by_time(path.parent):
                if other.resolve() not in self.intact:
                    remove(other)


class BestCheckpoint(AtomicCheckpoint):
    """The weights that score best in validation, for `sample` and `export`.

    The last weights take part only if training ends with a validation.

    Args:
        dirpath: folder of the checkpoints, another one than that of the run's state.
        monitor: what is compared, as it is logged.
        mode: whether less of it is better, or more.
        keep: how many of the best are kept.
    """

    def __init__(self, dirpath: str, monitor: str = "val/fid", mode: str = "min", keep: int = 1) -> None:
        if mode not in ("min", "max") or keep < 1:
            raise InputError(f"a BestCheckpoint needs mode min or max and keep >= 1, got {mode!r} and {keep}")
        super().__init__(
            dirpath=dirpath,
            filename="{step:08d}",
            monitor=monitor,
            mode=mode,
            save_top_k=keep,
            save_weights_only=True,
            every_n_epochs=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for other in trainer.checkpoint_callbacks:
            if (
                isinstance(other, Checkpoint)
                and Path(str(other.dirpath)).resolve() == Path(str(self.dirpath)).resolve()
            ):
                raise InputError(f"Checkpoint and BestCheckpoint both write to {self.dirpath}: give them two folders")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.callback_metrics.pop(str(self.monitor), None)  # of an earlier validation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)


def forget_logged(trainer: L.Trainer, step: int) -> None:
    """Tell TensorBoard that steps from `step` on, which a killed run may have logged, come again."""
    for writer in writers(trainer):
        event = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        writer._get_file_writer().add_event(event)
