"""Checks of numeric sampling settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from lightning_mvar.errors import InputError


def number(name: str, value: Any, high: float = math.inf, low: float = 0) -> float:
    """Converts a number of any type, such as numpy's, to float; raises InputError outside [low, high]."""
    return float(checked(name, value, Real, "a number", low, high))


def integer(name: str, value: Any, high: float = math.inf, low: float = 0) -> int:
    """Converts an integer of any type to int; raises InputError outside [low, high]."""
    return int(checked(name, value, Integral, "an integer", low, high))


def per_scale(name: str, value: Any, high: float, low: float = 0) -> float | tuple[float, ...]:
    """Converts one number for all scales, or a sequence with one per scale; raises InputError outside [low, high]."""
    values = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    if isinstance(values, Sequence) and not isinstance(values, str):
        return tuple(number(f"{name} of scale {k}", each, high, low) for k, each in enumerate(values))
    return number(name, values, high, low)


def checked(name: str, value: Any, kind: type, article: str, low: float, high: float) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
        limits = f"from {low:g} to {high:,}" if high < math.inf else f"of at least {low:g}"
        raise InputError(f"{name} must be {article} {limits}, got {value!s:.80}")
    return value
