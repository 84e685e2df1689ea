"""Costs against formulas, against complete networks, and budgets against an exhaustive search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import MIXERS, SCHEDULE, tiny_network

from lightning_mvar import MVAR, MVARConfig, ScaleSchedule
from lightning_mvar.errors import InputError
from lightning_mvar.models.costs import (
    costs_of,
    count_flops,
    count_parameters,
    forward_flops,
    match_budget,
    scale_flops,
    state_bytes,
    teacher_forced_pass,
)

PERIODIC_MIXERS = [  # the pattern repeats after one, two and six blocks, three times and by one block more
    {"depth": 4, "mixers": ("scale_mamba", "mamba1")},
    {"depth": 7, "mixers": (("scale_attention", "mamba2"), ("scale_attention",))},
    {"depth": 19, "mixers": (("scale_attention", "mamba2"), (), ("mamba1",)), "scan_order": "alternating"},
]


def config(**overrides: object) -> MVARConfig:
    return tiny_network(**overrides).config


def test_flops_of_var_match_the_formula() -> None:
    var, l, d = config(mixers=MIXERS["var"], depth=5), SCHEDULE.num_tokens, 64
    pairs = sum(n * (begin + n) for n, begin in zip(SCHEDULE.lengths, SCHEDULE.offsets, strict=True))
    block = 2 * l * 12 * d * d + 2 * 2 * pairs * d  # linear layers, attention
    adaln = 2 * 6 * d * d
    outside = 2 * (l - 1) * var.code_dim * d + 2 * l * d * var.vocab_size + 2 * 2 * d * d
    forward = 5 * (block + adaln) + outside
    costs = costs_of(var)
    assert forward_flops(var) == forward
    assert costs.flops_per_training_image == 3 * forward
    heads = (SCHEDULE.num_scales - 1) * 2 * 2 * d * d  # the head's AdaLN runs once per scale
    assert costs.flops_per_sampled_image == 2 * (forward + heads) == 2 * sum(scale_flops(var))
    first = 5 * (2 * 12 * d * d + 2 * 2 * d + adaln) + 2 * d * var.vocab_size + 2 * 2 * d * d
    assert scale_flops(var)[0] == first
    assert costs.state_bytes_per_image == 5 * 2 * l * d * 4


@pytest.mark.parametrize("variant", PERIODIC_MIXERS, ids=str)
def test_costs_of_deep_networks_are_extrapolated_exactly(variant: dict[str, object]) -> None:
    """Counts a network directly, and extrapolates from shallower ones."""
    deep = config(schedule=ScaleSchedule((1, 2)), **variant)
    network = MVAR(deep)
    costs = costs_of(deep)
    assert costs.parameters == count_parameters(deep) == sum(p.numel() for p in network.parameters())
    assert costs.flops_per_training_image == 3 * count_flops(lambda: teacher_forced_pass(network.to("meta")))


def test_flops_of_token_prediction_match_the_formula() -> None:
    causal, l, d = config(mixers=MIXERS["var"], prediction="token", depth=3), SCHEDULE.num_tokens, 64
    pairs = l * (l + 1) // 2  # a step attends to earlier tokens; the full pass also counts masked pairs
    block = 2 * l * 12 * d * d + 2 * 2 * pairs * d
    outside = 2 * (l - 1) * causal.code_dim * d + 2 * l * d * causal.vocab_size + l * 2 * 2 * d * d
    assert costs_of(causal).flops_per_sampled_image == 2 * (3 * (block + 2 * 6 * d * d) + outside)
    assert sum(scale_flops(causal)) == 3 * (block + 2 * 6 * d * d) + outside
    assert len(scale_flops(causal)) == SCHEDULE.num_scales


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1", "gated_linear_attention", "linear_attention"])
def test_the_state_of_a_recurrence_is_the_same_at_any_resolution(mixer: str) -> None:
    sizes = {"depth": 2, "width": 64, "heads": 2, "state_dim": 16, "head_dim": 32}
    sizes_in_bytes = {
        state_bytes(MVARConfig(ScaleSchedule(sides), mixers=("scale_attention", mixer), **sizes), torch.float32)
        for sides in [(1, 2), (1, 2, 3, 4), (1, 3, 9, 18)]
    }
    convolution = {"mamba2": 3 * (128 + 2 * 16), "mamba1": 3 * 128}.get(mixer, 0)
    assert sizes_in_bytes == {2 * 4 * (128 * 16 + convolution)}


def test_scanning_in_both_directions_needs_two_states() -> None:
    one, two = (costs_of(config(mixers=("mamba2",), scan_order=order)) for order in ("raster", "both"))
    assert two.state_bytes_per_image == 2 * one.state_bytes_per_image
    assert two.parameters == one.parameters
    assert one.flops_per_training_image < two.flops_per_training_image < 2 * one.flops_per_training_image


def test_the_markov_state_is_the_previous_scale() -> None:
    markov = config(mixers=("scale_attention", "markov_attention"))
    assert costs_of(markov).state_bytes_per_image == 2 * 2 * SCHEDULE.lengths[-1] * 64 * 4


@pytest.mark.parametrize("budget", [{"parameters": 250_000}, {"flops": 60_000_000}])
@pytest.mark.parametrize("by", ["width", "depth"])
def test_the_network_nearest_to_a_budget_is_found(by: str, budget: dict[str, int]) -> None:
    """Compares with all candidates. Widths are multiples of 16: 2 heads, and 2 d a multiple of head dim 32."""
    start = config()
    candidates = [replace(start, **{by: value}) for value in (range(16, 129, 16) if by == "width" else range(1, 7))]
    (target,) = budget.values()

    def cost(network: MVARConfig) -> int:
        return count_parameters(network) if "parameters" in budget else 3 * forward_flops(network)

    best = min(candidates, key=lambda network: abs(cost(network) - target))
    assert candidates.index(best) not in (0, len(candidates) - 1)
    assert match_budget(start, by, **budget) == best


def test_invalid_budgets_are_rejected() -> None:
    with pytest.raises(InputError, match="below the cost of the smallest network, width 16"):
        match_budget(config(), "width", parameters=100)
    for wrong in ({}, {"parameters": 10, "flops": 10}):
        with pytest.raises(InputError, match="a budget needs either `parameters` or `flops`"):
            match_budget(config(), "width", **wrong)
    with pytest.raises(InputError, match="`by` must be `width` or `depth`"):
        match_budget(config(), "heads", parameters=10**6)
