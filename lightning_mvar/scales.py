"""Scale schedules: the token maps of an image, and the position of each scale in the packed sequence.

An image is a pyramid of K token maps, coarse to fine, usually square. Its tokens are packed into one sequence: all of
scale 0 in raster order, then all of scale 1, and so on (VAR, arXiv 2404.02905, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from numbers import Integral

import torch

from lightning_mvar.errors import InputError

PUBLISHED_SIDE_LENGTHS = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}

MAX_TOKENS = 2**20  # of an image: a forged schedule must not allocate without limit; images of 1024 px have 9,451
Shape = tuple[int, int]  # (height, width) of a token map, or of an image in pixels


@dataclass(frozen=True)
class ScaleSchedule:
    """The side lengths of all token maps, coarse to fine.

    Args:
        side_lengths: side of each token map (upstream: `patch_nums`), or (height, width) if it is not square. Height,
            width or both grow from each scale to the next.

    Raises:
        InputError: if there are no scales, a side is below 1, the maps do not grow, or they have too many tokens.
    """

    side_lengths: tuple[int | Shape, ...] = PUBLISHED_SIDE_LENGTHS[256]

    def __post_init__(self) -> None:
        shapes = [shape_of(side) for side in self.side_lengths]
        growing = all(f != c and f[0] >= c[0] and f[1] >= c[1] for c, f in pairwise(shapes))
        if not shapes or min(shapes[0]) < 1 or not growing:
            raise InputError(
                f"side_lengths must be positive and strictly increasing, got {str(self.side_lengths)[:200]}"
            )
        if sum(lengths_of(shapes)) > MAX_TOKENS:
            raise InputError(f"side_lengths up to {self.side_lengths[-1]} make more than {MAX_TOKENS} tokens")
        sides = tuple(height if height == width else (height, width) for height, width in shapes)
        object.__setattr__(self, "side_lengths", sides)

    @classmethod
    def for_resolution(cls, resolution: int) -> ScaleSchedule:
        """Returns the published schedule for square images of 256, 512 or 1024 pixels per side."""
        if resolution not in PUBLISHED_SIDE_LENGTHS:
            raise InputError(f"no published schedule for {resolution} px; use 256, 512 or 1024")
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
        """Name of each scale in logs and tables: its side, or HEIGHTxWIDTH if it is not square."""
        return tuple("x".join(map(str, side if isinstance(side, tuple) else (side,))) for side in self.side_lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens in each scale."""
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
        """Number of tokens in the coarsest scale, which have no teacher-forcing input."""
        return self.lengths[0]

    @cached_property
    def scale_ids(self) -> torch.Tensor:
        """Scale index of each packed token, (l,) int64."""
        return torch.repeat_interleave(torch.arange(self.num_scales), torch.tensor(self.lengths))

    def ratio(self, scale: int) -> float:
        """Returns the relative position of `scale`, from 0.0 (coarsest) to 1.0 (finest)."""
        return scale / max(self.num_scales - 1, 1)


def shape_of(size: int | Sequence[int]) -> Shape:
    """Returns the height and width of a size given as one side or as [height, width].

    Raises:
        InputError: if `size` is neither one whole number nor two.
    """
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
        raise InputError(f"a size is one side or [height, width] in whole numbers; got {size!r:.200}")
    return int(sides[0]), int(sides[1])


def lengths_of(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Returns the number of tokens in each token map."""
    return tuple(math.prod(shape) for shape in shapes)


def format_shape(shape: Shape) -> str:
    """Formats a size for a message."""
    return f"{shape[0]} x {shape[1]}" + (" (height x width)" if shape[0] != shape[1] else "")
