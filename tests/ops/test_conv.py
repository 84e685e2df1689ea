"""The causal convolution against torch's own."""

import pytest
import torch

from lightning_mvar.ops.conv import causal_conv


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_it_equals_a_depthwise_convolution_with_its_gradients(taps: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, taps - 1 + length, 5), (5, taps), (5,))
    ]
    results = []
    for own in (True, False):
        x, weight, bias = (t.clone().requires_grad_() for t in tensors)
        if own:
            y = causal_conv(x, weight, bias)
        else:
            y = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, groups=5).transpose(1, 2)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, weight.grad, bias.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
