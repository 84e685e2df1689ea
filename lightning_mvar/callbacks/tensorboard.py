"""TensorBoard specifics: histograms of counts, repeated steps, and event files that cannot be written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

# Step of entries about the whole run; a restart in the same folder purges everything from step 0 on.
BEFORE_TRAINING = -1
MAX_BUCKETS = 64  # per histogram


def writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """Returns the writers of the trainer's TensorBoard loggers; empty on ranks that do not log."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def purge_logged_steps(trainer: L.Trainer, step: int) -> None:
    """Makes TensorBoard drop values logged at `step`, counted from 0, and later ones, which this run logs again."""
    for writer in writers(trainer):
        event = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        writer._get_file_writer().add_event(event)


class TolerantRecordWriter:
    """A TensorBoard record writer that warns and drops all further records once one cannot be written.

    Training continues without curves. Readers stop at a torn record, so no other is written after it.
    """

    def __init__(self, records: Any, folder: str) -> None:
        self.records, self.folder, self.failed = records, folder, False

    def write(self, data: bytes) -> None:
        self.attempt(lambda: self.records.write(data))

    def flush(self) -> None:
        self.attempt(self.records.flush)

    def close(self) -> None:
        self.attempt(self.records.close)

    def attempt(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except OSError as error:
            self.failed = True
            log.warning(
                "cannot write TensorBoard's events to %s (%s): training continues without TensorBoard; "
                "--resume starts a new event file",
                self.folder,
                error.strerror or error,
            )


def survive_write_errors(writer: SummaryWriter) -> None:
    """Makes a full disk end the curves of a run but not the run itself; TensorBoard would raise in the next step."""
    events = writer._get_file_writer().event_writer._async_writer
    if not isinstance(events._writer, TolerantRecordWriter):
        events._writer = events._worker._record_writer = TolerantRecordWriter(events._writer, writer.log_dir)


def bucket_counts(counts: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns n heights and n + 1 edges of a histogram of the codes 0 to v - 1; code i occurs counts[i] times."""
    codes = np.arange(len(counts))
    return np.histogram(codes, min(len(counts), MAX_BUCKETS), range=(0, len(counts)), weights=counts.numpy())


def add_counts(writer: SummaryWriter, tag: str, counts: Tensor, step: int) -> None:
    """Adds a histogram of code counts (v,); see `bucket_counts`."""
    codes = torch.arange(len(counts))
    occurring = codes[counts > 0]
    heights, edges = bucket_counts(counts)
    writer.add_histogram_raw(
        tag,
        min=int(occurring[0]),
        max=int(occurring[-1]) + 1,
        num=int(counts.sum()),
        sum=int((codes * counts).sum()),
        sum_squares=int((codes.square() * counts).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=heights.tolist(),
        global_step=step,
    )
