"""Which scales an image has, and where each scale's tokens lie in the packed sequence.

An image is a pyramid of K token maps, coarse to fine, square as a rule. Its tokens are packed into one sequence: all of
scale 0 in raster order, then all of scale 1, and so on (VAR, arXiv 2404.02905, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from lightning_mvar.errors import InputError

PUBLISHED_SIDE_LENGTHS = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


Shape = tuple[int, int]  # height and width: of a token map, or of an image in pixels


@dataclass(frozen=True)
class ScaleSchedule:
    """The side length of every token map, coarse to fine.

    Args:
        side_lengths: side of each token map (upstream: `patch_nums`), or (height, width) of one that is not square.
            From scale to scale one of the two grows, or both.

    Raises:
        InputError: if there is no scale, a side is below 1, or the maps do not grow.
    """

    side_lengths: tuple[int | Shape, ...] = PUBLISHED_SIDE_LENGTHS[256]

    def __post_init__(self) -> None:
        shapes = [shape_of(side) for side in self.side_lengths]
        grows = all(f != c and f[0] >= c[0] and f[1] >= c[1] for c, f in pairwise(shapes))
        if not shapes or min(shapes[0]) < 1 or not grows:
            raise InputError(f"side_lengths must be positive and strictly increasing, got {self.side_lengths}")
        sides = tuple(height if height == width else (height, width) for height, width in shapes)
        object.__setattr__(self, "side_lengths", sides)

    @classmethod
    def for_resolution(cls, resolution: int) -> ScaleSchedule:
        """The published schedule for images of `resolution` pixels a side: 256, 512 or 1024."""
        if resolution not in PUBLISHED_SIDE_LENGTHS:
            raise InputError(f"no published schedule for {resolution} px; there is one for 256, 512 and 1024")
        return cls(PUBLISHED_SIDE_LENGTHS[resolution])

    @property
    def num_scales(self) -> int:
        return len(self.side_lengths)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Height and width of each token map."""
        return tuple(shape_of(side) for side in self.side_lengths)

    @property
    def names(self) -> tuple[str, ...]:
        """What each scale is called in logs and tables: its side, or HEIGHTxWIDTH where that is not one number."""
        return tuple("x".join(map(str, side if isinstance(side, tuple) else (side,))) for side in self.side_lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return lengths_of(self.shapes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Position of each scale's first token in the packed sequence."""
        return tuple(sum(self.lengths[:k]) for k in range(self.num_scales))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def first(self) -> int:
        """Tokens of the coarsest scale, the ones that no teacher-forcing input precedes."""
        return self.lengths[0]

    @cached_property
    def scale_ids(self) -> torch.Tensor:
        """(l,) int64: the scale that each packed token belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_scales), torch.tensor(self.lengths))

    def ratio(self, scale: int) -> float:
        """How far `scale` is from the coarsest (0.0) to the finest (1.0)."""
        return scale / max(self.num_scales - 1, 1)


def shape_of(size: int | Sequence[int]) -> Shape:
    """Height and width of what is given by its side, or by both.

    Raises:
        InputError: if it is neither one number nor two.
    """
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2:
        raise InputError(f"a size is one side, or [height, width]; got {size}")
    return int(sides[0]), int(sides[1])


def lengths_of(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Tokens of each token map."""
    return tuple(math.prod(shape) for shape in shapes)


def in_words(shape: Shape) -> str:
    """A size, for a message."""
    return f"{shape[0]} x {shape[1]}" + (" (height x width)" if shape[0] != shape[1] else "")
