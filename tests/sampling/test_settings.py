"""Sampling settings: their ranges and types."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.sampling.settings import SamplingSettings


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("guidance", [-1.0, math.nan, math.inf, 1e30, True, "1.5", None], "guidance must be a number from 0 to 1,000"),
        ("top_k", [-1, 1.5, 900.0, True, math.nan], "top_k must be an integer of at least 0"),
        ("top_p", [-0.1, 1.0001, math.nan, math.inf, True], "top_p must be a number from 0 to 1"),
        ("seed", [-1, 2**63, 10**40, 0.5, True], "seed must be an integer from 0 to 9,223,372,036,854,775,807"),
        ("smooth", ["no", 1, None], "smooth must be True or False"),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(name: str, values: list[Any], message: str) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"{message}, got"):
            SamplingSettings(**{name: value})


def test_limits_are_allowed_and_numpy_numbers_become_those_of_python() -> None:
    SamplingSettings(guidance=1000, top_k=2**70, top_p=0, seed=2**63 - 1)
    settings = SamplingSettings(np.float32(0.5), np.int64(3), np.float64(1), seed=np.uint8(7))
    assert settings == SamplingSettings(0.5, 3, 1.0, seed=7)
    assert json.loads(json.dumps(asdict(settings)))["top_k"] == 3
