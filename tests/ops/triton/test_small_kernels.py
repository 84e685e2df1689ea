"""AdaLN and QK-norm in Triton kernels against PyTorch operations; on a CPU, Triton interprets the kernels."""

import gc
import math
from functools import partial

import pytest
import torch
from conftest import relative_error
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from lightning_mvar.ops import adaln, qk_norm
from lightning_mvar.ops.kernels import KERNELS, triton_kernels
from lightning_mvar.ops.recompute import Recipes, recomputation
from lightning_mvar.ops.triton.adaln import add_and_modulate, add_gated, modulate
from lightning_mvar.ops.triton.qk_norm import qk_norm as qk_norm_kernel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
B, D, H = 2, 24, 3
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def check(kernel, reference, arguments: list[Tensor], dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """Compares outputs and gradients of `kernel`, checkpointed, in `dtype` with those of `reference` in float32."""
    results = []
    for function, cast in ((partial(checkpoint, kernel, use_reentrant=False), dtype), (reference, torch.float32)):
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


def add_and_modulate_in_kernel(x: Tensor, y: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return add_and_modulate(x + 3, table[:, :1], y, table[:, 1:2], table[:, 2:], adaln.NORM_EPS, x.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 65])
def test_add_and_modulate_equals_the_reference(length: int, dtype: torch.dtype, device: str) -> None:
    check(
        lambda *arguments: torch.stack(add_and_modulate_in_kernel(*arguments)),
        lambda x, y, table: torch.stack(adaln.add_and_modulate(x + 3, table[:, :1], y, table[:, 1:2], table[:, 2:])),
        random(device, (B, length, D), (B, length, D), (B, 3, D)),
        dtype,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_add_and_modulate_equals_its_two_parts_in_the_dtypes_of_autocast(device: str) -> None:
    x, y, table = random(device, (B, 65, D), (B, 65, D), (B, 3, D))
    (gate, gain, shift), y = table.bfloat16().split(1, dim=1), y.bfloat16()
    added, modulated = add_and_modulate(x, gate, y, gain, shift, adaln.NORM_EPS, torch.bfloat16)
    torch.testing.assert_close(added, add_gated(x, gate, y), rtol=1e-6, atol=1e-6)
    assert torch.equal(modulated, modulate(added, gain, shift, adaln.NORM_EPS, torch.bfloat16))


def test_what_add_and_modulate_modulates_is_computed_again_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kernel in triton_kernels("cpu").items():
        monkeypatch.setitem(KERNELS, name, kernel)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    x, y, gate, gain, shift, weight = random("cpu", (B, 65, D), (B, 65, D), *[(B, 1, D)] * 3, (D, D))
    weight.requires_grad_()
    gradients = []
    for recipes in (None, Recipes()):
        with recomputation(recipes):
            _, modulated = adaln.add_and_modulate(x, gate, y, gain, shift)
            out = modulated @ weight
        storage = StorageWeakRef(modulated.untyped_storage())
        del modulated
        gc.collect()  # Triton's interpreter leaves cycles that hold the arguments
        assert storage.expired() == (recipes is not None)
        gradients.append(torch.autograd.grad(out.sum(), weight)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("length", "p"), [(1, 8), (65, 8), pytest.param(65, 64, marks=pytest.mark.cuda)])
def test_qk_norm_equals_the_reference(length: int, p: int, dtype: torch.dtype, device: str) -> None:
    """One head's scale is above the maximum, where its gradient is zero; published networks have p = 64."""
    d = H * p
    qkv, q_bias, v_bias = random(device, (B, length, 3 * d), (d,), (d,))
    scale_log = torch.tensor([1.0, 5.0, -1.0], device=device)
    identity = torch.eye(3 * d, device=device)
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
        (add_and_modulate, (x, gate, x.clone(), gate.clone(), gate.clone(), 1e-6, torch.bfloat16)),
        (qk_norm_kernel, (qkv, bias, bias.clone(), scale_log, 4.0)),
    ]
    for operator, arguments in calls:
        leaves = [t.requires_grad_() if isinstance(t, Tensor) else t for t in arguments]
        torch.library.opcheck(operator, leaves, test_utils=OPCHECKS)
