"""Conversion of batches from any DataLoader to the batch types of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mvar.data.images.examples import ImageBatch
from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.scales import Shape


def token_batch(batch: Any, network: MVARConfig) -> TokenBatch:
    """Converts a batch from any DataLoader to a TokenBatch.

    Args:
        batch: a TokenBatch, or a pair (tokens (b, l), labels (b,)) of integers.
        network: the network that will read it.

    Raises:
        InputError: if it is neither, or its tokens do not fit the network's schedule and vocabulary.
    """
    if isinstance(batch, TokenBatch):
        return batch
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError("a batch must be a TokenBatch or a pair (tokens (b, l), labels (b,))")
    tokens, length = batch[0], network.schedule.num_tokens
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.shape[1:] != (length,):
        raise InputError(f"tokens of a batch must be an integer tensor (b, {length})")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < network.vocab_size:
        raise InputError(f"tokens of a batch must be in [0, {network.vocab_size - 1}]")
    labels = labels_of(batch[1], network.num_classes)
    if len(labels) != len(tokens):
        raise InputError(f"a batch has {len(tokens)} rows of tokens and {len(labels)} labels")
    every = torch.ones(len(labels), dtype=torch.bool)
    return TokenBatch(tokens.long(), labels, every, torch.full((len(labels),), -1))


def global_rows(batch: TokenBatch, rank: int, world_size: int) -> list[int]:
    """Returns the positions of this rank's images in the global batch, which has all real images, then own samples."""
    count = len(batch.labels)
    if batch.own is None:
        return [*range(rank * count, (rank + 1) * count)]
    real = range(rank * (count // 2), (rank + 1) * (count // 2))
    return [*real, *(world_size * (count // 2) + row for row in real)]


def labels_of(batch: Any, num_classes: int) -> Tensor:
    """Returns the labels (b,) int64 of a batch, which are the batch itself or its last element, without padding.

    Raises:
        InputError: if it has no labels, or one is not in [0, num_classes]; `num_classes` means unconditional.
    """
    if isinstance(batch, TokenBatch):
        labels = batch.labels[batch.valid]
    else:
        labels = batch[-1] if isinstance(batch, tuple | list) else batch
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        raise InputError("labels must be an integer tensor (b,): the batch itself, or its last element")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= num_classes:
        raise InputError(f"labels must be in [0, {num_classes}], got {labels.min()} to {labels.max()}")
    return labels.long()


def image_batch(batch: Any, shape: Shape) -> ImageBatch:
    """Converts a batch from any DataLoader to an ImageBatch.

    Args:
        batch: an ImageBatch, images (b, 3, H, W) in [-1, 1], or a tuple or list whose first element is such images.
        shape: height and width of the tokenizer's images.

    Raises:
        InputError: if it is none of these.
    """
    if isinstance(batch, ImageBatch):
        return batch
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[1:] != (3, *shape):
        raise InputError(f"images of a batch must be a float tensor (b, 3, {shape[0]}, {shape[1]}) in [-1, 1]")
    return ImageBatch(images, torch.full((len(images),), -1), [], [], [])
