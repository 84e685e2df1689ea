"""AdaLN and QK-norm in Triton kernels against PyTorch operations; on a CPU, Triton interprets the kernels."""

import math

import pytest
import torch
from conftest import relative_error
from torch import Tensor

pytest.importorskip("triton")

from lightning_mvar.ops import adaln, qk_norm
from lightning_mvar.ops.triton.adaln import add_gated, modulate
from lightning_mvar.ops.triton.qk_norm import qk_norm as qk_norm_kernel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
B, D, H = 2, 24, 3
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def check(kernel, reference, arguments: list[Tensor], dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """Compares outputs and gradients of `kernel` in `dtype` with those of `reference` in float32."""
    results = []
    for function, cast in ((kernel, dtype), (reference, torch.float32)):
        leaves = [t.to(dtype).to(cast).detach().requires_grad_() for t in arguments]
        out = function(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device)
        (out * weights).sum().backward()
        assert out.dtype == cast
        results.append([out, *(t.grad for t in leaves)])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < TOLERANCE[dtype]


def random(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 65])
def test_modulate_equals_the_reference(length: int, dtype: torch.dtype, device: str) -> None:
    x, table = random(device, (B, length, D), (B, 2, D))
    check(
        lambda x, table: modulate(x + 3, table[:, :1], table[:, 1:], adaln.NORM_EPS, x.dtype),
        lambda x, table: adaln.modulate(x + 3, table[:, :1], table[:, 1:]),
        [x, table],
        dtype,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_add_gated_equals_the_reference(dtype: torch.dtype, device: str) -> None:
    check(add_gated, adaln.add_gated, random(device, (B, 65, D), (B, 1, D), (B, 65, D)), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 65])
def test_qk_norm_equals_the_reference(length: int, dtype: torch.dtype, device: str) -> None:
    """One head's scale is above the maximum, where its gradient is zero."""
    qkv, q_bias, v_bias, _ = random(device, (B, length, 3 * D), (D,), (D,), (H,))
    scale_log = torch.tensor([1.0, 5.0, -1.0], device=device)
    identity = torch.eye(3 * D, device=device)
    check(
        lambda *arguments: qk_norm_kernel(*arguments, math.log(qk_norm.MAX_QK_SCALE)).transpose(2, 3),
        lambda qkv, *rest: torch.stack(qk_norm.normalized_qkv(qkv, identity, *rest)),
        [qkv, q_bias, v_bias, scale_log],
        dtype,
    )


def test_operators_are_registered_as_torch_compile_expects() -> None:
    x, gate, qkv, bias, scale_log = random("cpu", (B, 3, D), (B, 1, D), (B, 3, 3 * D), (D,), (H,))
    calls = [
        (modulate, (x, gate, gate.clone(), 1e-6, torch.bfloat16)),
        (add_gated, (x, gate, x.clone())),
        (qk_norm_kernel, (qkv, bias, bias.clone(), scale_log, 4.0)),
    ]
    for operator, arguments in calls:
        leaves = [t.requires_grad_() if isinstance(t, Tensor) else t for t in arguments]
        torch.library.opcheck(operator, leaves, test_utils=OPCHECKS)
