"""Sampling settings, shared by the command line, callbacks, pipeline and web page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.sampling.philox import image_keys

MAX_GUIDANCE = 1000  # logits stay finite in float32
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of token sampling; the defaults are those of the papers' scores.

    Args:
        guidance: classifier-free guidance scale at the finest scale, growing from 0 at the coarsest; 0 for none.
        top_k: sample from the k most likely tokens; 0, or more than the vocabulary has, for all.
        top_p: then from the fewest tokens whose probabilities sum to p; 0 or 1 for all.
        smooth: mix codes by a Gumbel-softmax instead of drawing one: smoother images to look at, never for scores.
        seed: random seed, from 0 to 2^63 - 1; image i of a seed has a random stream of its own.

    Raises:
        InputError: if a value is out of range or of another type.
    """

    guidance: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    smooth: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.normalize("guidance", Real, MAX_GUIDANCE)
        self.normalize("top_k", Integral, math.inf)
        self.normalize("top_p", Real, 1)
        self.normalize("seed", Integral, MAX_SEED)
        if not isinstance(self.smooth, bool):
            raise InputError(f"smooth must be True or False, got {self.smooth!r}")

    def normalize(self, name: str, kind: type, high: float) -> None:
        """Turns a number of any type, such as numpy's, into one of Python; raises InputError outside [0, high]."""
        value: Any = getattr(self, name)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= high:
            limits = f"from 0 to {high:,}" if high < math.inf else "of at least 0"
            raise InputError(f"{name} must be {'an integer' if kind is Integral else 'a number'} {limits}, got {value}")
        object.__setattr__(self, name, int(value) if kind is Integral else float(value))

    def keys(self, numbers: Iterable[int]) -> Tensor:
        """Returns the key (b, 2) int64 of the random numbers of each image, given by its number."""
        return image_keys(self.seed, numbers)
