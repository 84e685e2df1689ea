"""Labelled images by number, all of one size, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from lightning_mvar.scales import Shape

OnCorrupt = Literal["raise", "skip"]
Crop = Literal["center", "random"]


@dataclass
class Example:
    """One image (3, H, W) float32 in [-1, 1]; `image` is None, and `error` says why, where it could not be read."""

    image: Tensor | None
    label: int
    key: str
    error: str | None = None


@dataclass
class ImageBatch:
    """The readable examples of a batch, and a message for each of the others."""

    images: Tensor  # (b, 3, H, W) float32 in [-1, 1]
    labels: Tensor  # (b,) int64
    keys: list[str]
    errors: list[str]
    unread: list[str]  # the keys of those others, without the number of a view


class Examples(Protocol):
    """Labelled images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Images(Examples, Protocol):
    """Labelled images of a source, each cropped at its centre."""

    class_names: list[str]
    shape: Shape

    @property
    def identity(self) -> str: ...  # changes when the images do


class ImageSource(Images, Protocol):
    """Images that can also be cropped at a random place."""

    # Of each image, a number that it shares with those it is best read together with; None where that is all the same.
    groups: NDArray[np.int64] | None

    @property
    def listing(self) -> str: ...  # the same for the same images and labels, wherever they are stored

    def cropped(self, index: int, generator: Generator) -> Example: ...

    def key(self, index: int) -> str: ...  # of its example, without reading the image


class Views:
    """Several random crops of every image of a source: `views` times as many examples.

    Example i is drawn from (seed, i) alone, so it is the same in any process and after any interruption.

    Args:
        source: the images.
        views: crops of each.
        seed: of the crops.
        flips: mirror half of them, at random.
    """

    def __init__(self, source: ImageSource, views: int, seed: int, flips: bool = False) -> None:
        self.source, self.views, self.seed, self.flips = source, views, seed, flips

    def __len__(self) -> int:
        return len(self.source) * self.views

    def __getitem__(self, index: int) -> Example:
        image, view = divmod(index, self.views)
        generator = generator_for(self.seed, index)
        example = self.source.cropped(image, generator)
        if example.image is None:
            return example  # an image is told of once, whatever the views
        if self.flips and torch.rand((), generator=generator) < 0.5:
            example = replace(example, image=example.image.flip(2))
        return replace(example, key=f"{example.key}#{view}")


def generator_for(*key: int) -> Generator:
    """One that draws what the key alone decides. (To seed torch's own generator takes a thousand times as long.)"""
    return Generator().manual_seed(random.Random("-".join(map(str, key))).getrandbits(63))


def find_by_key(source: ImageSource, views: int, seed: int, flips: bool, keys: Sequence[str]) -> list[Example | None]:
    """The examples, as they were tokenized, that have these keys; None for a key that the source has not.

    Args:
        source: of the images.
        views: of each, whose number follows a "#" in the key where there are more than one.
        seed: of the views.
        flips: whether half of them are mirrored.
        keys: as the shards have them.
    """
    examples: Examples = source if views == 1 else Views(source, views, seed, flips)
    images = [key if views == 1 else key.rpartition("#")[0] for key in keys]
    wanted = set(images)
    numbers = {key: index for index in range(len(source)) if (key := source.key(index)) in wanted}
    view = [0 if views == 1 else int(key.rpartition("#")[2]) for key in keys]
    places = [numbers.get(image) for image in images]
    return [None if i is None else examples[i * views + v] for i, v in zip(places, view, strict=True)]


def image_loader(
    images: Examples, batch_size: int, num_workers: int, chosen: Sequence[int] | None = None
) -> DataLoader[ImageBatch]:
    """Batches of all images in order, or of those `chosen` by number, read in processes, or in this one for 0."""
    numbers = range(len(images)) if chosen is None else chosen
    return batch_loader(images, batched(numbers, batch_size), num_workers)


def batched(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]


def batch_loader(images: Examples, batches: Iterable[Sequence[int]], num_workers: int) -> DataLoader[ImageBatch]:
    """Batches of the images with these numbers, read in processes, two batches of each ahead, or in this one for 0."""
    return DataLoader[Example](  # type: ignore[return-value]  # which are collated
        images,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),  # not the global one: reading must not change what is drawn elsewhere
    )


def collate(examples: list[Example]) -> ImageBatch:
    """Stack the readable examples; keep the others' messages."""
    good = [example for example in examples if example.image is not None]
    images = [cast(Tensor, example.image) for example in good]
    return ImageBatch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([example.label for example in good], dtype=torch.int64),
        [example.key for example in good],
        [example.error for example in examples if example.error is not None],
        [example.key for example in examples if example.error is not None],
    )
