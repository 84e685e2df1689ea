"""The chunked scan against the loop: output, final state and each gradient."""

from collections.abc import Callable

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from lightning_mvar.ops.ssd import ssd, ssd_batched, ssd_chunked, ssd_recurrent

Scan = Callable[..., tuple[Tensor, Tensor]]
FAST = [ssd_chunked, ssd_batched]
LENGTHS = [1, 2, 63, 64, 65, 680]
# Maximum difference over maximum magnitude. In bfloat16 the loop rounds only inputs and output, the chunked form also
# its matrix products: a few times the rounding unit of 2 ** -8.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def scan_inputs(length: int, dtype: torch.dtype, b: int = 2, h: int = 3, p: int = 8, n: int = 5) -> list[Tensor]:
    """Returns x, dt, A, B, C and a nonzero state, in argument order."""
    generator = torch.Generator().manual_seed(length)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, B, C = randn(b, length, h, p).to(dtype), randn(b, length, n).to(dtype), randn(b, length, n).to(dtype)
    dt = torch.nn.functional.softplus(randn(b, length, h) - 2)
    return [x, dt, -torch.rand(h, generator=generator) * 8 - 0.1, B, C, randn(b, h, p, n)]


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", LENGTHS)
def test_fast_forms_equal_the_loop_in_outputs_state_and_gradients(length: int, dtype: torch.dtype, fast: Scan) -> None:
    results = []
    for scan in (ssd_recurrent, fast):
        inputs = [t.requires_grad_() for t in scan_inputs(length, dtype)]
        y, state = scan(*inputs)
        (y.float().square().sum() + state.square().sum()).backward()
        results.append([y, state, *[t.grad for t in inputs]])
    names = ["y", "state", "x.grad", "dt.grad", "A.grad", "B.grad", "C.grad", "initial_state.grad"]
    for name, expected, actual in zip(names, *results, strict=True):
        assert actual.dtype == expected.dtype, name
        assert relative_error(actual, expected) < TOLERANCE[dtype], name


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 200])
def test_the_chunk_size_does_not_change_the_result(chunk_size: int) -> None:
    inputs = scan_inputs(130, torch.float32)
    for actual, expected in zip(ssd_chunked(*inputs, chunk_size=chunk_size), ssd_recurrent(*inputs), strict=True):
        assert relative_error(actual, expected) < 2e-5


def test_scanning_in_pieces_equals_one_scan() -> None:
    x, dt, A, B, C, state = scan_inputs(30, torch.float32)
    full, final = ssd(x, dt, A, B, C, state)
    parts, start = [], 0
    for length in (1, 4, 9, 16):
        part = slice(start, start + length)
        y, state = ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part], state)
        parts.append(y)
        start += length
    assert relative_error(torch.cat(parts, dim=1), full) < 1e-5
    assert relative_error(state, final) < 1e-5


def test_no_initial_state_means_zeros() -> None:
    *inputs, state = scan_inputs(20, torch.float32)
    for scan in (ssd_recurrent, *FAST):
        for actual, expected in zip(scan(*inputs), scan(*inputs, torch.zeros_like(state)), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("fast", FAST)
def test_decays_that_underflow_float32_equal_the_loop(fast: Scan) -> None:
    results = []
    for scan in (ssd_recurrent, fast):
        x, _, _, B, C, state = scan_inputs(100, torch.float32)
        inputs = [x, torch.full((2, 100, 3), 20.0), torch.tensor([-16.0, -1.0, -1e-3]), B, C, state]
        y, final = scan(*(t.requires_grad_() for t in inputs))
        (y.square().sum() + final.square().sum()).backward()
        results.append([y, final, *[t.grad for t in inputs]])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < 2e-5
