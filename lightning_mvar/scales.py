"""Which scales an image has, and where each scale's tokens lie in the packed sequence.

An image is a pyramid of K square token maps, coarse to fine. Its tokens are packed into one sequence: all of scale 0
in raster order, then all of scale 1, and so on (VAR, arXiv 2404.02905, section 3.2).
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class ScaleSchedule:
    """The side length of every token map, coarse to fine.

    Args:
        side_lengths: side of each square token map, strictly increasing (upstream: `patch_nums`).

    Raises:
        InputError: if there is no scale, a side is below 1, or the sides do not grow.
    """

    side_lengths: tuple[int, ...] = PUBLISHED_SIDE_LENGTHS[256]

    def __post_init__(self) -> None:
        sides = tuple(int(side) for side in self.side_lengths)
        grows = all(fine > coarse for coarse, fine in pairwise(sides))
        if not sides or sides[0] < 1 or not grows:
            raise InputError(f"side_lengths must be positive and strictly increasing, got {self.side_lengths}")
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
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.side_lengths)

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
