"""Sampling settings, shared by the command line, callbacks, pipeline and web page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Generator

from lightning_mvar.errors import InputError


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of token sampling; the defaults are those of the papers' scores.

    Args:
        guidance: classifier-free guidance scale at the finest scale, growing from 0 at the coarsest; 0 for none.
        top_k: sample from the k most likely tokens; 0 for all.
        top_p: then from the fewest tokens whose probabilities sum to p; 1 for all.
        smooth: mix codes by a Gumbel-softmax instead of drawing one: smoother images to look at, never for scores.
        seed: random seed; image i of a seed is the same in any batch.

    Raises:
        InputError: if a value is out of range.
    """

    guidance: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    smooth: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.guidance < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"guidance and top_k must not be negative, top_p in (0, 1]: got {self.guidance}, {self.top_k}, "
                f"{self.top_p}"
            )

    def generators(self, numbers: Iterable[int]) -> list[Generator]:
        """Returns one CPU generator per image number."""
        return image_generators(self.seed, numbers)


def image_generators(seed: int, numbers: Iterable[int]) -> list[Generator]:
    """Returns one CPU generator per image number, so that an image is the same in any batch."""
    return [Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number) % 2**63) for number in numbers]
