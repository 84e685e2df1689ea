"""What the data sets have in common whose images come with an installed package, without a download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.errors import InputError

Split = Literal["train", "test"]
RESOLUTION = 32


@dataclass(frozen=True)
class EmbeddedSet:
    """Labelled square RGB images in two splits, each with a margin that random crops reach into.

    Args:
        name: what stands before the colon of a source, such as `digits` in `digits:train`.
        class_names: in label order.
        margin: pixels on each side; a random crop moves an image by at most so many.
        load_wide: split -> images (n, 3, side, side) float32 in [-1, 1] with side = resolution + 2 margin, labels (n,)
            int64.
        resolution: side of the images without their margin, in pixels.
    """

    name: str
    class_names: tuple[str, ...]
    margin: int
    load_wide: Callable[[Split], tuple[Tensor, Tensor]]
    resolution: int = RESOLUTION

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Images (n, 3, resolution, resolution) float32 in [-1, 1], and labels (n,) int64."""
        wide, labels = self.load_wide(split)
        return self.centre(wide), labels

    def centre(self, wide: Tensor) -> Tensor:
        """Images (n, 3, resolution, resolution) without their margin."""
        return F.pad(wide, (-self.margin,) * 4)


def check_split(name: str, split: str) -> None:
    """Raise InputError unless an embedded set has such a split."""
    if split not in get_args(Split):
        raise InputError(f"{name} have the splits {' and '.join(get_args(Split))}, not {split!r}")
