"""TensorBoard images and code histograms."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

# Step of entries about the run as a whole; a restart in the same folder purges everything from step 0 on.
BEFORE_TRAINING = -1
MAX_BUCKETS = 64  # per histogram


def writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """Returns the writers of the trainer's TensorBoard loggers; empty on ranks that do not log."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def log_image(trainer: L.Trainer, tag: str, image: Tensor) -> None:
    """Logs an image (3, H, W) in [0, 1]."""
    for writer in writers(trainer):
        writer.add_image(tag, image.float().cpu(), trainer.global_step)


def log_codes(trainer: L.Trainer, tag: str, counts: Tensor, names: Sequence[str]) -> None:
    """Logs histograms of code counts (k, v): `TAG/K` for the scale named K, `TAG/all` for all scales together."""
    for writer in writers(trainer):
        by_name = dict(zip(names, counts.cpu(), strict=True)) | {"all": counts.sum(dim=0).cpu()}
        for name, code_counts in by_name.items():
            if code_counts.any():
                add_counts(writer, f"{tag}/{name}", code_counts, trainer.global_step)


def add_counts(writer: SummaryWriter, tag: str, counts: Tensor, step: int) -> None:
    """Adds a histogram of the codes 0, 1, ..., v - 1, of which code i occurs counts[i] times."""
    codes = torch.arange(len(counts))
    occurring = codes[counts > 0]
    buckets = min(len(counts), MAX_BUCKETS)
    heights, edges = np.histogram(codes.numpy(), buckets, range=(0, len(counts)), weights=counts.numpy())
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
