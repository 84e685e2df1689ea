"""Mamba-2 in Triton kernels against PyTorch operations; on a CPU, Triton interprets the kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lightning_mvar.ops.mamba2 import Mamba2Parameters, mamba2_reference
from lightning_mvar.ops.triton.mamba2 import mamba2_forward

H, P, N, TAPS = 2, 8, 4, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
EPS = 0.1  # large: the norm of 16 channels would amplify the rounding of rows that are nearly 0
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
OUTPUTS = ["y", "new_conv_state", "new_scan_state"]
ARGUMENTS = ["projected", *Mamba2Parameters._fields, "conv_state", "scan_state"]


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mends the interpreter of Triton 3.7, which multiplies the bits of bfloat16 as integers, and rounds towards 0."""
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(t: TensorHandle) -> TensorHandle:
        if t.dtype.scalar != tl.bfloat16:
            return t
        return TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def product(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return create_dot(self, widened(a), widened(b), *rest)

    def cast(self: InterpreterBuilder, t: TensorHandle, dtype: Any) -> TensorHandle:
        if (t.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, t, dtype)
        rounded = torch.tensor(t.data).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)


def random_arguments(length: int, dtype: torch.dtype, with_state: bool, p: int = P, n: int = N) -> list[Tensor | None]:
    """Returns the kernels' arguments: projection and convolution's state in `dtype`, all others in float32."""
    b, inner, channels = 2 if length <= 2 else 1, H * p, H * p + 2 * n
    generator = torch.Generator().manual_seed(length)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    parameters = Mamba2Parameters(
        randn(channels, TAPS), randn(channels), randn(H) - 2, randn(H).abs(), randn(H), randn(inner)
    )
    state = [randn(b, TAPS - 1, channels).to(dtype), randn(b, H, p, n)] if with_state else [None, None]
    return [randn(b, length, inner + channels + H).to(dtype), *parameters, *state]


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], arguments: list[Tensor | None]
) -> dict[str, Tensor]:
    """Returns outputs and states, and the gradients of a weighted sum of them."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in arguments]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in outputs]
    torch.stack([(t * weight).sum() for t, weight in zip(outputs, weights, strict=True)]).sum().backward()
    gradients = {f"{name}.grad": t.grad for name, t in zip(ARGUMENTS, leaves, strict=True) if t is not None}
    return dict(zip(OUTPUTS, outputs, strict=True)) | gradients  # type: ignore[arg-type]


def reference(*arguments: Tensor | None) -> tuple[Tensor, ...]:
    projected, *parameters, conv_state, scan_state = arguments
    state = None if conv_state is None else (conv_state, scan_state)
    y, new_state = mamba2_reference(projected, Mamba2Parameters(*parameters), state, EPS)
    return y, *new_state


def kernels(*arguments: Tensor | None) -> tuple[Tensor, ...]:
    return mamba2_forward(*arguments, EPS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("length", "with_state"), [(1, True), (2, True), (63, True), (64, True), (65, False), (200, True)]
)
def test_kernels_equal_the_reference(length: int, with_state: bool, dtype: torch.dtype, device: str) -> None:
    """Compares outputs, states and every gradient with float32; bfloat16 may err a few times as much as in PyTorch."""
    compare_with_reference([None if t is None else t.to(device) for t in random_arguments(length, dtype, with_state)])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 65, 680])
def test_kernels_equal_the_reference_at_the_published_sizes(length: int, dtype: torch.dtype) -> None:
    """Head dim and state 64, which a GPU processes in chunks of 64 tokens in bfloat16 and 32 in float32."""
    arguments = random_arguments(length, dtype, with_state=True, p=64, n=64)
    compare_with_reference([None if t is None else t.cuda() for t in arguments])


def compare_with_reference(arguments: list[Tensor | None]) -> None:
    assert arguments[0] is not None
    dtype = arguments[0].dtype
    actual = outputs_and_gradients(kernels, arguments)
    expected = outputs_and_gradients(reference, [None if t is None else t.float() for t in arguments])
    rounded = outputs_and_gradients(reference, arguments)
    for name in expected:
        bound = max(TOLERANCE[dtype], 3 * relative_error(rounded[name], expected[name]))
        assert relative_error(actual[name], expected[name]) < bound, name
    assert actual["y"].dtype == actual["new_conv_state"].dtype == actual["projected.grad"].dtype == dtype
    assert actual["new_scan_state"].dtype == torch.float32


@pytest.mark.parametrize("with_state", [True, False])
def test_the_operator_is_registered_as_torch_compile_expects(with_state: bool) -> None:
    arguments = [t if t is None else t.requires_grad_() for t in random_arguments(2, torch.float32, with_state)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(mamba2_forward, (*arguments, EPS), test_utils=checks)


def test_gradients_are_the_same_under_activation_checkpointing() -> None:
    recomputed = lambda *arguments: checkpoint(kernels, *arguments, use_reentrant=False)  # noqa: E731
    arguments = random_arguments(2, torch.float32, with_state=True)
    actual, expected = (outputs_and_gradients(function, arguments) for function in (recomputed, kernels))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
