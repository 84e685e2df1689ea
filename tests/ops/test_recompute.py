"""Recomputing cheap operands changes no bit of the gradients, and keeps less."""

from __future__ import annotations

import pytest
import torch
from conftest import MIXERS, SCHEDULE, VARIANTS, LiveMemory, tiny_network
from torch import Tensor

from lightning_mvar.ops.recompute import Recipes, cheap, recomputation


def run_block(variant: dict[str, object], dtype: torch.dtype, recompute: bool) -> list[Tensor]:
    """Returns output and gradients."""
    block = tiny_network(**variant).train().blocks[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, SCHEDULE.num_tokens, 64, generator=generator, requires_grad=True)
    cond = torch.randn(3, *((1, 6, 64) if variant.get("shared_adaln") else (64,)), generator=generator)
    with (
        recomputation(Recipes() if recompute else None),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        y, _ = block(x, cond, block.config.step_shapes)
    y.float().square().sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_are_the_same_to_the_bit(variant: dict[str, object], dtype: torch.dtype) -> None:
    plain, recomputed = (run_block(variant, dtype, recompute) for recompute in (False, True))
    assert all(torch.equal(actual, expected) for actual, expected in zip(recomputed, plain, strict=True))


def test_blocks_keep_less_for_their_backward_pass() -> None:
    kept = []
    for recipes in (None, Recipes()):
        block = tiny_network(mixers=MIXERS["mvar"]).train().blocks[1]
        x = torch.randn(3, SCHEDULE.num_tokens, 64, requires_grad=True)
        with recomputation(recipes), LiveMemory() as memory:
            y, _ = block(x, torch.ones(3, 64), block.config.step_shapes)
            kept.append(memory.bytes() / (y.numel() * y.element_size()))
    assert kept[1] < 0.8 * kept[0]


def test_cheap_operands_are_kept_as_recipes() -> None:
    calls = []

    def double(t: Tensor) -> Tensor:
        calls.append(t)
        return 2 * t

    x = torch.randn(4, 6, requires_grad=True)
    with recomputation(Recipes()):
        once = cheap(double, x)
        twice = cheap(double, once)
        y = twice.t().square()  # its backward pass reads a view of `twice`
    assert len(calls) == 2
    del once, twice
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert len(calls) == 4  # both again, because the second needs the first
    torch.testing.assert_close(gradient, 32 * x.detach())


def test_a_result_that_is_its_argument_is_kept() -> None:
    x = torch.randn(3, requires_grad=True)
    with recomputation(Recipes()):
        y = cheap(Tensor.float, x * 2).square().sum()
    (gradient,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(gradient, 8 * x.detach())
