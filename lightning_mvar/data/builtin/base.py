"""Common interface of the embedded sets, whose images ship with installed packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.errors import InputError

Split = Literal["train", "test", "subtrain", "validation"]
RESOLUTION = 32


@dataclass(frozen=True)
class EmbeddedSet:
    """Labeled square RGB images in fixed splits, each image with a margin for random crops.

    Args:
        name: name before the colon of a source, such as `digits` in `digits:train`.
        class_names: class names in label order.
        margin: pixels on each side, and maximum shift of a random crop.
        load_with_margin: split -> images (n, 3, side, side) float32 in [-1, 1] with side = resolution + 2 margin, and
            labels (n,) int64.
        resolution: side of the images without margin, in pixels.
    """

    name: str
    class_names: tuple[str, ...]
    margin: int
    load_with_margin: Callable[[Split], tuple[Tensor, Tensor]]
    resolution: int = RESOLUTION

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Returns images (n, 3, resolution, resolution) float32 in [-1, 1] and labels (n,) int64."""
        images, labels = self.load_with_margin(split)
        return self.center(images), labels

    def center(self, images: Tensor) -> Tensor:
        """Removes the margin: (n, 3, side, side) -> (n, 3, resolution, resolution)."""
        return F.pad(images, (-self.margin,) * 4)


def check_split(name: str, split: str, splits: tuple[Split, ...]) -> None:
    """Raises InputError if `split` is not one of the `splits` of an embedded set."""
    if split not in splits:
        raise InputError(f"{name} have the splits {', '.join(splits[:-1])} and {splits[-1]}, not {split!r}")
