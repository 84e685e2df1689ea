"""Labeled images of one size by index, and batches of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from lightning_mvar.data.images.names import log_once
from lightning_mvar.data.resumable import worker_options
from lightning_mvar.scales import Shape

OnCorrupt = Literal["raise", "skip"]
Crop = Literal["center", "random"]


@dataclass
class Example:
    """An image (3, H, W) float32 in [-1, 1], or None with the reason in `error` if it could not be decoded."""

    image: Tensor | None
    label: int
    key: str
    error: str | None = None


class ImageBatch(NamedTuple):
    """The decoded examples of a batch, and the keys and errors of examples that failed."""

    images: Tensor  # (b, 3, H, W) float32 in [-1, 1]
    labels: Tensor  # (b,) int64
    keys: list[str]
    errors: list[str]
    failed_keys: list[str]  # keys of the failed images, without view numbers


class Examples(Protocol):
    """Labeled images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class ImageSource(Examples, Protocol):
    """Labeled images of one size, cropped at the center or at random."""

    class_names: list[str]
    labels: NDArray[np.int64]  # (n,) known without reading the images
    shape: Shape
    # Read-locality group of each image (e.g. Parquet row group); None if order does not matter.
    groups: NDArray[np.int64] | None

    @property
    def crop(self) -> str: ...  # how images are resized and cropped; see `protocols`

    @property
    def identity(self) -> str: ...  # changes when the images do

    @property
    def listing(self) -> str: ...  # hash of keys, labels and class names, independent of storage

    def random_crop(self, index: int, generator: Generator) -> Example: ...

    def key(self, index: int) -> str: ...  # key of an example, known without reading the image


class Views:
    """Several random crops (views) of each image of a source.

    Example i depends only on (seed, i), so it is the same in any process and after any interruption.

    Args:
        source: the images.
        views: crops per image.
        seed: seed of the crops.
        flips: whether to mirror a random half of the crops.
    """

    def __init__(self, source: ImageSource, views: int, seed: int, flips: bool = False) -> None:
        self.source, self.views, self.seed, self.flips = source, views, seed, flips

    def __len__(self) -> int:
        return len(self.source) * self.views

    def __getitem__(self, index: int) -> Example:
        image, view = divmod(index, self.views)
        generator = generator_for(self.seed, index)
        example = self.source.random_crop(image, generator)
        if example.image is None:
            return example  # without a view number, so that a failed image is reported once
        if self.flips and torch.rand((), generator=generator) < 0.5:
            example = replace(example, image=example.image.flip(2))
        return replace(example, key=f"{example.key}#{view}")


def generator_for(*key: int) -> Generator:
    """Returns a generator whose draws depend only on `key`.

    Seeding torch's global generator instead would take a thousand times as long.
    """
    return Generator().manual_seed(random.Random("-".join(map(str, key))).getrandbits(63))


def find_by_key(source: ImageSource, views: int, seed: int, flips: bool, keys: Sequence[str]) -> list[Example | None]:
    """Returns the examples with these keys as they were tokenized, None for keys that are not in the source.

    Args:
        source: the images.
        views: crops per image; if more than one, keys end with "#" and the number of the view.
        seed: seed of the crops.
        flips: whether a random half of the crops is mirrored.
        keys: keys of the token shards.
    """
    examples: Examples = source if views == 1 else Views(source, views, seed, flips)
    split = [(key, 0) if views == 1 else split_key(key, views) for key in keys]
    requested = {key for key, _ in split}
    index_of: dict[str | None, int] = {
        key: index for index in range(len(source)) if (key := source.key(index)) in requested
    }
    return [None if (index := index_of.get(key)) is None else examples[index * views + view] for key, view in split]


def split_key(key: str, views: int) -> tuple[str | None, int]:
    """Splits the key of a view into the image's key and the view's number; (None, 0) if that is not below `views`."""
    image, _, view = key.rpartition("#")
    is_view = view.isdecimal() and len(view) <= len(str(views)) and int(view) < views
    return (image, int(view)) if is_view else (None, 0)


def decoded_batches(
    images: Examples, batch_size: int, num_workers: int, indices: Sequence[int]
) -> Iterator[ImageBatch]:
    """Yields the images at `indices` in non-empty batches; logs each skipped image once."""
    for batch in batch_loader(images, batched(indices, batch_size), num_workers):
        for message in batch.errors:
            log_once(logging.WARNING, f"skipped: {message}")
        if len(batch.images):
            yield batch


def spaced_evenly(count: int, limit: int) -> NDArray[np.int64]:
    """Returns up to `limit` indices below `count`, evenly spaced and in order: sources are ordered by class."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)


def batched(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[begin : begin + size] for begin in range(0, len(indices), size)]


def batch_loader(
    images: Examples, batches: Iterable[Sequence[int]], num_workers: int, pin_memory: bool = False
) -> DataLoader[ImageBatch]:
    """Returns a loader of the given index batches; each worker reads two batches ahead."""
    return DataLoader[Example](  # type: ignore[return-value]  # collated to ImageBatch
        images,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        pin_memory=pin_memory,
        **worker_options(num_workers),
        generator=torch.Generator(),  # own generator: loading must not advance the global one
    )


def collate(examples: list[Example]) -> ImageBatch:
    """Stacks the decoded examples and collects the errors of the others."""
    good = [example for example in examples if example.image is not None]
    images = [cast(Tensor, example.image) for example in good]
    return ImageBatch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([example.label for example in good], dtype=torch.int64),
        [example.key for example in good],
        [example.error for example in examples if example.error is not None],
        [example.key for example in examples if example.error is not None],
    )
