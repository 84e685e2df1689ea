"""The Mamba-1 and linear attention scans against loops: output, final state and each gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_mvar.ops.linear_attention import MIN_LOG_DECAY, linear_attention, linear_attention_recurrent
from lightning_mvar.ops.selective_scan import selective_scan, selective_scan_recurrent

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 200]
TOLERANCE = {
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
}  # both forms compute in float32 and round only inputs and outputs
Scan = Callable[..., tuple[Tensor, Tensor]]


def randn_for(length: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(length)
    return lambda *shape: torch.randn(*shape, generator=generator)


def selective_inputs(length: int, dtype: torch.dtype, b: int = 2, c: int = 6, n: int = 5) -> list[Tensor]:
    randn = randn_for(length)
    x, B, C = randn(b, length, c).to(dtype), randn(b, length, n).to(dtype), randn(b, length, n).to(dtype)
    return [x, F.softplus(randn(b, length, c) - 1), -randn(c, n).exp(), B, C, randn(b, c, n)]


def attention_inputs(length: int, dtype: torch.dtype, b: int = 2, h: int = 3, n: int = 5, p: int = 4) -> list[Tensor]:
    """Returns inputs whose decays cover the allowed range."""
    randn = randn_for(length)
    q, k, v = randn(b, length, h, n).to(dtype), randn(b, length, h, n).to(dtype), randn(b, length, h, p).to(dtype)
    return [q, k, v, MIN_LOG_DECAY * torch.sigmoid(3 * randn(b, length, h, n) - 3), randn(b, h, p, n)]


CASES = {
    "selective": (selective_scan, selective_scan_recurrent, selective_inputs),
    "linear attention": (linear_attention, linear_attention_recurrent, attention_inputs),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_the_fast_scan_equals_the_loop(case: str, length: int, dtype: torch.dtype) -> None:
    fast, loop, make = CASES[case]
    results = []
    for scan in (loop, fast):
        inputs = [t.requires_grad_() for t in make(length, dtype)]
        y, state = scan(*inputs)
        (y.float().square().sum() + state.square().sum()).backward()
        results.append([y, state, *[t.grad for t in inputs]])
    for i, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert actual.dtype == expected.dtype, i
        assert relative_error(actual, expected) < TOLERANCE[dtype], i


@pytest.mark.parametrize("case", CASES)
def test_scanning_in_pieces_equals_one_scan(case: str) -> None:
    scan, _, make = CASES[case]
    *inputs, state = make(30, torch.float32)
    full, final = scan(*inputs, state)
    parts, start = [], 0
    for length in (1, 4, 9, 16):
        piece = [t[:, start : start + length] if t.ndim > 2 else t for t in inputs]  # A has no token axis
        y, state = scan(*piece, state)
        parts.append(y)
        start += length
    assert relative_error(torch.cat(parts, dim=1), full) < 1e-5
    assert relative_error(state, final) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_no_initial_state_means_zeros(case: str) -> None:
    for scan in CASES[case][:2]:
        *inputs, state = CASES[case][2](20, torch.float32)
        for actual, expected in zip(scan(*inputs), scan(*inputs, torch.zeros_like(state)), strict=True):
            assert torch.equal(actual, expected)


def test_a_token_independent_decay_broadcasts() -> None:
    q, k, v, _, state = attention_inputs(40, torch.float32)
    decay = -torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    expanded = decay.expand(2, 40, 3, 5)
    torch.testing.assert_close(linear_attention(q, k, v, decay, state), linear_attention(q, k, v, expanded, state))


def test_the_minimum_log_decay_gives_finite_outputs_and_gradients() -> None:
    q, k, v, _, state = (t.requires_grad_() for t in attention_inputs(50, torch.float32))
    decay = torch.full((2, 50, 3, 5), MIN_LOG_DECAY, requires_grad=True)
    y, final = linear_attention(q, k, v, decay, state)
    expected, _ = linear_attention_recurrent(q, k, v, decay, state)
    assert relative_error(y, expected) < 2e-5
    (y.sum() + final.sum()).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v, decay, state))


def test_the_selective_scan_counts_its_flops() -> None:
    with FlopCounterMode(display=False) as counter:
        selective_scan(*selective_inputs(70, torch.float32))
    assert counter.get_total_flops() == 4 * 2 * 70 * 6 * 5


def test_the_selective_scan_passes_opcheck() -> None:
    """torch.compile relies on a consistent schema, fake tensors and autograd."""
    x, dt, A, B, C, state = (t.requires_grad_() for t in selective_inputs(70, torch.float32))
    torch.library.opcheck(torch.ops.lightning_mvar.selective_scan.default, (x, dt, A, B, C, state))
