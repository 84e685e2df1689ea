"""The causal convolution against torch.nn.functional.conv1d."""

import pytest
import torch

import lightning_mvar.ops.conv
from lightning_mvar.ops.conv import causal_conv


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["sum of products", "oneDNN"])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_outputs_and_gradients_equal_conv1d(
    taps: int, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_mvar.ops.conv, "ONEDNN_DTYPES", (torch.float32,))
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((2, taps - 1 + length, 5), (5, taps), (5,))
    ]
    results = []
    for use_ours in (True, False):
        x, weight, bias = (t.clone().requires_grad_() for t in tensors)
        if use_ours:
            y = causal_conv(x, weight, bias)
        else:
            y = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, groups=5).transpose(1, 2)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, weight.grad, bias.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_contiguous_and_keeps_the_input_dtype(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 9, 16), torch.randn(16, 4), torch.randn(16)
    y = causal_conv(x.to(dtype), weight, bias)
    assert y.dtype == dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y.float(), causal_conv(x, weight, bias), rtol=0.05, atol=0.1)
