"""The gated norm against its formula in plain torch."""

import pytest
import torch
import torch.nn.functional as F

import lightning_mvar.ops.gated_norm
from lightning_mvar.ops.gated_norm import gated_rms_norm


@pytest.mark.parametrize("block_elements", [1, 12, 100])
def test_outputs_and_gradients_equal_the_formula(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_mvar.ops.gated_norm, "BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(0)
    y, projected, weight, dout = (
        torch.randn(*shape, generator=generator) for shape in ((2, 7, 5), (2, 7, 9), (5,), (2, 7, 5))
    )
    results = []
    for use_ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (y, projected, weight)]
        values, (z, _), w = (
            leaves[0],
            leaves[1].split([5, 4], dim=-1),
            leaves[2],
        )  # z is a strided slice of a projection
        out = gated_rms_norm(values, z, w, 1e-2) if use_ours else F.rms_norm(values * F.silu(z), (5,), w, 1e-2)
        out.backward(dout)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_the_result(dtype: torch.dtype) -> None:
    """400 silu(400) overflows float16, but its norm does not."""
    y = torch.linspace(-400, 400, 60).view(3, 20).to(dtype)
    weight = torch.linspace(0.5, 2, 20).to(dtype)
    out = gated_rms_norm(y, y.abs(), weight, 1e-5)
    assert out.dtype == dtype
    expected = F.rms_norm(y.float() * F.silu(y.float().abs()), (20,), weight.float(), 1e-5)
    assert torch.equal(out, expected.to(dtype))
