"""Costs of drawing an image, against the tokens and FLOPs that pass through the networks of a sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MIXERS, SCHEDULE, tiny_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mvar import MVARConfig, ScaleSchedule
from lightning_mvar.sampling.costs import sampling_costs
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import BatchInputs, ScaleDrawer
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer

WEAKER = {"mixers": MIXERS["var"], "depth": 1}


@pytest.mark.parametrize(
    ("options", "weaker"),
    [
        ({}, None),
        ({"guidance": 0}, None),
        ({"guidance_off_from": 2}, None),
        ({"guidance": [1, 1, 0, 0]}, None),
        ({"guidance_corrupt": 0.5}, None),
        ({}, WEAKER),
        ({"guidance_off_from": 2}, WEAKER),
    ],
    ids=str,
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_token_steps_and_flops_are_those_of_the_sampler(
    mixer: str, options: dict[str, Any], weaker: dict[str, Any] | None
) -> None:
    network = tiny_network(mixers=MIXERS[mixer]).to("meta")
    guide = None if weaker is None else tiny_network(**weaker).to("meta")
    settings, passed = SamplingSettings(**options), []

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        passed.append(inputs[0].shape[:2].numel())

    for each in (network, guide):
        if each is not None:
            each.blocks[0].register_forward_pre_hook(count)
    drawer = ScaleDrawer(network, ResidualQuantizer(SCHEDULE, 48, 8, 1).to("meta"), settings, guide)
    keys = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        list(drawer.steps(BatchInputs(keys[:, 0], keys, None)))
    phi = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    costs = sampling_costs(settings, network.config, None if guide is None else guide.config)
    assert costs.token_steps_per_image == sum(passed)
    assert costs.flops_per_sampled_image == counter.get_total_flops() - phi


def test_token_steps_saved_by_dropping_the_guide_at_256_pixels() -> None:
    network = MVARConfig(ScaleSchedule.for_resolution(256), depth=1, width=64, heads=1)
    every = sampling_costs(SamplingSettings(), network).token_steps_per_image
    assert every == 2 * 680
    for off_from, share in ((9, 0.188), (8, 0.3125), (0, 0.5)):
        left = sampling_costs(SamplingSettings(guidance_off_from=off_from), network).token_steps_per_image
        assert 1 - left / every == pytest.approx(share, abs=5e-4)
