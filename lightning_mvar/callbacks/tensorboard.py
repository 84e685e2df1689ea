"""Writing to TensorBoard: pictures, and how often each code is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

# The step of what is said of a run as a whole: a run that begins anew in the same folder forgets all from step 0 on.
BEFORE_TRAINING = -1
MAX_BUCKETS = 64  # of a histogram


def writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """Those of the trainer's TensorBoard loggers; none on ranks that do not log."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def log_image(trainer: L.Trainer, tag: str, image: Tensor) -> None:
    """Show a picture (3, H, W) in [0, 1]."""
    for writer in writers(trainer):
        writer.add_image(tag, image.float().cpu(), trainer.global_step)


def log_codes(trainer: L.Trainer, tag: str, counts: Tensor, names: Sequence[str]) -> None:
    """Show as histograms how often each code was chosen (k, v): `TAG/K` at the scale named K, `TAG/all` at any."""
    for writer in writers(trainer):
        named = dict(zip(names, counts.cpu(), strict=True)) | {"all": counts.sum(dim=0).cpu()}
        for scale, each in named.items():
            if each.any():
                add_counts(writer, f"{tag}/{scale}", each, trainer.global_step)


def add_counts(writer: SummaryWriter, tag: str, counts: Tensor, step: int) -> None:
    """The histogram of v numbers 0, 1, ... that occur `counts` (v,) times each."""
    numbers = torch.arange(len(counts))
    occurring = numbers[counts > 0]
    buckets = min(len(counts), MAX_BUCKETS)
    heights, edges = np.histogram(numbers.numpy(), buckets, range=(0, len(counts)), weights=counts.numpy())
    writer.add_histogram_raw(
        tag,
        min=int(occurring[0]),
        max=int(occurring[-1]) + 1,
        num=int(counts.sum()),
        sum=int((numbers * counts).sum()),
        sum_squares=int((numbers.square() * counts).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=heights.tolist(),
        global_step=step,
    )
