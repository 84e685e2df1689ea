"""Checkpoints that survive a kill at any point and resume bit-exactly."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint import CheckpointException

from lightning_mvar.callbacks.background import BackgroundWriter
from lightning_mvar.callbacks.tensorboard import purge_logged_steps
from lightning_mvar.checkpoints.training import (
    Checksums,
    hidden_path,
    mend_last,
    newest_first,
    publish,
    remove_checkpoint,
    remove_leftovers,
)
from lightning_mvar.devices import in_process_group
from lightning_mvar.errors import DivergedError, InputError, Interrupted, require_in
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.collectives import DelayedMax
from lightning_mvar.training.lightning_internals import (
    CheckpointHooks,
    DataParallelStrategy,
    collective_timeout,
    dump_checkpoint,
)

# Lightning's state of a validation pass interrupted in its first batch; after resuming, it repeats the whole pass.
UNFINISHED_VALIDATION = {
    "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
    "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
    "is_last_batch": False,
}


class DirectFileIO(TorchCheckpointIO):
    """Writes directly to the file; Lightning's own CheckpointIO goes through memory and the temporary folder first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:  # given a path, torch does not report that the disk is full
            torch.save(checkpoint, file)


class AtomicCheckpoint(CheckpointHooks):
    """ModelCheckpoint that gives files and folders their final name only when they are complete and on disk."""

    links_last = False  # whether `last.ckpt` points to the newest checkpoint
    writer: BackgroundWriter | None = None
    validation_unfinished = False

    def __init__(self, dirpath: str, save_top_k: int = -1, **options: Any) -> None:
        super().__init__(dirpath, "{step:08d}", save_top_k=save_top_k, enable_version_counter=False, **options)

    @property
    def folder(self) -> Path:
        return Path(str(self.dirpath)).resolve()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for other in trainer.checkpoint_callbacks:
            if isinstance(other, AtomicCheckpoint) and other is not self and other.folder == self.folder:
                names = f"{type(self).__name__} and {type(other).__name__}"
                raise InputError(f"{names} both write to {self.dirpath}: give each its own folder")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DirectFileIO()
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(Path(str(self.dirpath)))
            mend_last(Path(str(self.dirpath)))

    def write(self, trainer: L.Trainer, path: Path) -> None:
        self.save(trainer, path, single_rank=False)

    def save(self, trainer: L.Trainer, path: Path, single_rank: bool) -> None:
        """Writes a checkpoint: all ranks together, or this rank only if the others cannot be reached.

        With a background writer, all ranks only start to write; see `finish`.

        Raises:
            InputError: on all ranks, if any rank could not write.
        """
        if isinstance(trainer.lightning_module, ScheduledModule):
            trainer.lightning_module.saves_alone = single_rank
        if not single_rank:
            self.finish(trainer)
        checkpoint = dump_checkpoint(trainer, self.save_weights_only)
        self.discard_incomplete_progress(trainer, checkpoint["loops"]["fit_loop"])
        if single_rank:
            if (error := self.write_and_publish(trainer, path, checkpoint, None, single_rank)) is not None:
                self.raise_write_error(trainer, path, error)
        elif self.writer is None:
            self.raise_if_any_failed(trainer, path, self.write_and_publish(trainer, path, checkpoint, None))
        else:
            shards = isinstance(trainer.strategy, DataParallelStrategy)
            content = checkpoint if shards or trainer.is_global_zero else {}  # only rank 0 writes a single file
            self.writer.start(path, content, partial(self.write_and_publish, trainer, path))
        self.mark_saved(trainer, path)

    def write_and_publish(
        self,
        trainer: L.Trainer,
        path: Path,
        checkpoint: dict[str, Any],
        group: dist.ProcessGroup | None,
        single_rank: bool = False,
    ) -> BaseException | None:
        """Writes a checkpoint under a temporary name and renames it once all ranks have written.

        Returns this rank's error, if any. Collectives use `group`; in a thread, it must not be the default group.
        """
        temporary, strategy = hidden_path(path, "unfinished"), trainer.strategy
        error: BaseException | None = None
        checksums: Checksums | None = {}
        try:
            if isinstance(strategy, DataParallelStrategy):
                checksums = strategy.write_checkpoint(checkpoint, temporary, group)
            else:
                strategy.save_checkpoint(checkpoint, temporary)
        except (OSError, RuntimeError, CheckpointException) as caught:
            error, checksums = caught, None
        if not single_rank and trainer.world_size > 1:  # raises if the main thread has destroyed the group
            checksums = merge_checksums(checksums, group)
        if trainer.is_global_zero and checksums is not None:
            try:
                publish(temporary, path, checksums, self.links_last)
                self.after_publishing(path)
            except OSError as caught:
                error = caught
        return error

    def after_publishing(self, path: Path) -> None:
        """Hook on rank 0 once a checkpoint is complete and on disk."""

    def finish(self, trainer: L.Trainer) -> None:
        """Waits for the checkpoint that is being written, if any; all ranks must call this.

        Raises:
            InputError: on all ranks, if any rank could not write.
        """
        if self.writer is not None and self.writer.task is not None:
            self.raise_if_any_failed(trainer, self.writer.path, self.writer.wait())

    def finish_alone(self, trainer: L.Trainer) -> None:
        """Like `finish`, but for this rank only, which may have lost the others; raises InputError if it failed."""
        if self.writer is None:
            return
        try:
            error = self.writer.wait()
        except (RuntimeError, ValueError) as lost_rank:  # ValueError if its group no longer exists
            error = lost_rank
        if error is not None:
            self.raise_write_error(trainer, self.writer.path, error)

    def discard_incomplete_progress(self, trainer: L.Trainer, loop: dict[str, Any]) -> None:
        """Resets the progress to the last complete step and validation, so that unfinished work is repeated."""
        progress = loop["epoch_loop.batch_progress"]
        done = progress["current"]["processed"]
        progress["is_last_batch"] &= progress["current"]["ready"] == done  # was set when the batch was fetched
        repeated = 0 if done >= trainer.num_training_batches else done % trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            counts |= dict.fromkeys(counts, counts["processed"] - repeated)
        if self.validation_unfinished:
            loop["epoch_loop.val_loop.batch_progress"] = UNFINISHED_VALIDATION

    def raise_if_any_failed(self, trainer: L.Trainer, path: Path, error: BaseException | None) -> None:
        """Raises on all ranks if any rank has failed."""
        if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
            self.raise_write_error(trainer, path, error)

    def raise_write_error(self, trainer: L.Trainer, path: Path, error: BaseException | None) -> None:
        if trainer.is_global_zero:
            with suppress(OSError):  # on a full disk; the next start cleans up, and the user must see `error`
                remove_checkpoint(hidden_path(path, "unfinished"))
                mend_last(path.parent)
        self.mark_saved(trainer)  # a second attempt would fail too
        reason = "see the message of another rank" if error is None else failure_reason(error)
        raise InputError(
            f"cannot write the checkpoint {path} ({reason}); earlier ones are kept: free disk space, then use --resume"
        ) from error

    def delete(self, trainer: L.Trainer, path: Path) -> None:
        if trainer.is_global_zero:
            remove_checkpoint(path)


def merge_checksums(checksums: Checksums | None, group: dist.ProcessGroup | None) -> Checksums | None:
    """Returns the checksums of the files of all ranks; None on all ranks if any rank passes None."""
    parts: list[Checksums | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, checksums, group)
    merged: Checksums = {}
    for part in parts:
        if part is None:
            return None
        merged |= part
    return merged


def failure_reason(error: BaseException) -> str:
    """Returns the operating system's message of an error that a library may have wrapped."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause = error.__cause__ or error.__context__ or error
    error = cause if isinstance(cause, OSError) else error
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().splitlines()[0]


class Checkpoint(AtomicCheckpoint):
    """Saves the complete state of a run periodically, at its end, and before a signal or an exception ends it.

    Saves between two steps, after logging and validation of the last one, so that `--resume` continues as if the run
    had never stopped. `last.ckpt` links to the newest checkpoint.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: steps between checkpoints.
        train_time_interval: time between checkpoints, such as `00:30:00`, instead of steps.
        keep: number of newest checkpoints to keep; at least 2, so that one is left if the newest is damaged.
        async_save: pause training only to copy the state to the host, and write the copy in the background. A kill
            during the write loses the steps since the previous checkpoint. The run waits for a write before it starts
            the next one and at its end. Takes as much host memory as the checkpoint.
    """

    links_last = True

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        keep: int = 2,
        async_save: bool = False,
    ) -> None:
        if (every_n_train_steps is None) == (train_time_interval is None):
            raise InputError("a Checkpoint needs either every_n_train_steps or train_time_interval")
        require_in("[1, inf)", "Checkpoint's ", every_n_train_steps=every_n_train_steps)
        require_in("[2, inf)", "Checkpoint's ", keep=keep)
        super().__init__(dirpath, every_n_train_steps=1 if every_n_train_steps is None else every_n_train_steps)
        # Lightning's own interval makes ranks agree on the time in every step, and the host wait for the device.
        self.time_interval, self.last_due = train_time_interval, time.monotonic()
        self.due_on_any_rank: Callable[[int], int] = int
        self.keep, self.async_save = keep, async_save
        self.intact: list[Path] = []  # checkpoints that this run has read or written, oldest first; on rank 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.async_save:
            self.writer = BackgroundWriter(trainer.strategy.root_device, collective_timeout(trainer))
        if self.time_interval is not None:
            self.last_due, self.due_on_any_rank = time.monotonic(), DelayedMax(collective_timeout(trainer))
        if trainer.ckpt_path is not None:
            self.mark_saved(trainer)
            self.intact = [Path(trainer.ckpt_path).resolve()]
        purge_logged_steps(trainer, trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Saves the previous step if a checkpoint is due; raises if the last one could not be written."""
        if self.writer is not None and self.writer.has_ended():
            self.finish(trainer)
        if self.time_interval is None or self.is_due(trainer, self.time_interval):
            super().on_train_batch_end(trainer, pl_module, None, *args)

    def is_due(self, trainer: L.Trainer, interval: timedelta) -> bool:
        """Returns whether the interval has passed on rank 0's clock; all ranks return the same, one batch later."""
        due = trainer.is_global_zero and time.monotonic() - self.last_due >= interval.total_seconds()
        if due:
            self.last_due = time.monotonic()
        return bool(self.due_on_any_rank(int(due)))

    def on_train_batch_end(self, *args: Any) -> None:
        """Does nothing: the step has not been logged and validated yet."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_unfinished = not trainer.sanity_checking

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_unfinished = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.finish(trainer)
        if not self.skips_saving(trainer):
            self.save_now(trainer, single_rank=False)
        if self.writer is not None:
            self.writer.close()
            self.writer = None
        if self.last_saved:
            rank_zero_info(f"last checkpoint: {self.last_saved}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves the state after the last complete step.

        An exception on only some ranks can leave the others inside a collective operation. Rank 0 then saves without
        them, unless the network is sharded and rank 0 lacks part of the state. If saving fails, it only warns, because
        the user must see the exception.
        """
        all_ranks = isinstance(exception, Interrupted) or trainer.world_size == 1
        try:
            self.finish(trainer) if all_ranks else self.finish_alone(trainer)
            if self.can_save(trainer, pl_module, exception, all_ranks):
                self.save_now(trainer, single_rank=not all_ranks)
                rank_zero_info(f"saved {self.last_saved}; --resume continues from there")
        except InputError as error:
            if isinstance(exception, Interrupted):
                raise
            rank_zero_warn(f"{error}")

    def can_save(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException, all_ranks: bool
    ) -> bool:
        """Returns whether this rank can save a state that a run can continue from after an exception."""
        assert isinstance(module, ScheduledModule)
        useless = isinstance(exception, DivergedError | KeyboardInterrupt) or module.in_optimizer_step
        # A run resumed from the last step would not repeat the validation that was interrupted.
        outside = trainer.global_step in (0, trainer.max_steps)
        if useless or outside or self.skips_saving(trainer):
            return False
        unsharded = trainer.strategy.lightning_restore_optimizer  # False if each rank has a shard
        if not (all_ranks or (unsharded and trainer.is_global_zero)):
            return False
        if trainer.world_size > 1 and not in_process_group():  # see `abort_collectives`
            rank_zero_warn("steps since the last checkpoint are not saved: they may lack gradients of the lost rank")
            return False
        return True

    def save_now(self, trainer: L.Trainer, single_rank: bool) -> None:
        # Not named from Lightning's metrics: averaging them needs all ranks, some of which may be lost.
        path = self.format_checkpoint_name({"step": torch.tensor(trainer.global_step)})
        self.best_model_path = path
        self.save(trainer, Path(path), single_rank)
        if not single_rank:
            self.finish(trainer)

    def save(self, trainer: L.Trainer, path: Path, single_rank: bool) -> None:
        for logger in trainer.loggers:  # flush: values logged before a checkpoint must survive a kill after it
            logger.save()
        super().save(trainer, path, single_rank)

    def after_publishing(self, path: Path) -> None:
        """Removes all checkpoints but the `keep` newest ones that are known to be intact."""
        self.intact = [*self.intact, path.resolve()][-self.keep :]
        if len(self.intact) == self.keep:
            for other in newest_first(path.parent):
                if other.resolve() not in self.intact:
                    remove_checkpoint(other)


class BestCheckpoint(AtomicCheckpoint):
    """Keeps the weights that score best in validation, for `sample` and `export`.

    The final weights are considered only if training ends with a validation.

    Args:
        dirpath: folder of the checkpoints; not the folder of `Checkpoint`.
        monitor: logged metric to compare.
        mode: min if lower is better, max if higher is better.
        keep: number of best checkpoints to keep.
    """

    def __init__(self, dirpath: str, monitor: str = "val/fid", mode: str = "min", keep: int = 1) -> None:
        if mode not in ("min", "max") or keep < 1:
            raise InputError(f"a BestCheckpoint needs mode min or max and keep >= 1, got {mode!r} and {keep}")
        super().__init__(
            dirpath,
            keep,
            monitor=monitor,
            mode=mode,
            save_weights_only=True,
            every_n_epochs=1,
            save_on_train_epoch_end=False,
        )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.callback_metrics.pop(str(self.monitor), None)  # left by an earlier validation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (self.best_k_models or trainer.fast_dev_run):  # type: ignore[attr-defined]
            rank_zero_warn(
                f"no validation logged {self.monitor}: BestCheckpoint kept no weights; set monitor to a logged metric"
            )
