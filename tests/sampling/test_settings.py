"""Sampling settings: their ranges and types."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

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
        ("guidance", [[0.5, -1], (0, 2000)], r"guidance of scale 1 must be a number from 0 to 1,000"),
        ("temperature", [0, -1.0, math.nan, "1", 1e4], "temperature must be a number from 0.001 to 1,000"),
        ("guidance_off_from", [-1, 0.5, True], "guidance_off_from must be an integer of at least 0"),
        ("guidance_corrupt", [-0.1, 1.1, math.nan], "guidance_corrupt must be a number from 0 to 1"),
        ("guidance_beta", [-0.1, math.inf, "1"], "guidance_beta must be a number from 0 to 1,000"),
        ("temperature", [[1.0, 0.0]], "temperature of scale 1 must be a number from 0.001 to 1,000"),
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
    assert json.loads(json.dumps(settings.metadata()))["top_k"] == 3


def test_numbers_per_scale_may_come_from_lists_arrays_and_tensors() -> None:
    expected = SamplingSettings((0.5, 1.0), temperature=(1.0, 2.0))
    assert SamplingSettings([0.5, 1], temperature=[1, 2]) == expected
    assert SamplingSettings(np.array([0.5, 1]), temperature=torch.tensor([1, 2])) == expected
    assert hash(expected) == hash(SamplingSettings([0.5, 1], temperature=[1, 2]))


def test_metadata_is_flat_and_names_what_differs_from_the_published_protocol() -> None:
    protocol = {"guidance": 0.5, "top_k": 900, "top_p": 0.96, "smooth": False, "seed": 0}
    assert SamplingSettings(0.5).metadata() == protocol
    others = {"guidance_off_from": 1, "guidance_corrupt": 0.25, "guidance_beta": 0.75}
    settings = SamplingSettings([0, 0.1], temperature=[1, 0.9], **others)
    lists = {"guidance": "0.0,0.1", "temperature": "1.0,0.9"}
    assert settings.metadata() == protocol | others | lists


def test_metadata_of_drafts_need_several() -> None:
    unused, used = (SamplingSettings(drafts=m, draft_scorer="scorer", draft_scales=[1, 2]).metadata() for m in (1, 2))
    assert unused == SamplingSettings().metadata()
    assert used == unused | {"drafts": 2, "draft_scorer": "scorer", "draft_scales": "1,2"}
