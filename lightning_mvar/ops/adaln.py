"""AdaLN: a LayerNorm modulated by the class, and a gated residual (DiT, arXiv 2212.09748, section 3.2).

Shapes: b batch, l tokens, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.ops.kernels import KERNELS
from lightning_mvar.ops.recompute import cheap, mark_cheap

NORM_EPS = 1e-6


def modulate(x: Tensor, gain: Tensor, shift: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Computes LayerNorm(x) * gain + shift; the norm has no learned affine.

    Args:
        x: (b, l, d).
        gain, shift: (b, 1, d).
        dtype: of the result; None for the promoted dtype of the arguments.

    Returns:
        (b, l, d).
    """
    kernel = KERNELS.get("modulate") if x.is_cuda else None
    if kernel is not None:
        modulated: Tensor = kernel(x, gain, shift, NORM_EPS, dtype or torch.promote_types(x.dtype, gain.dtype))
        return modulated
    return torch.addcmul(shift, cheap(layer_norm, x), gain).to(dtype)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Computes x + gate * y; x and y (b, l, d), gate (b, 1, d); returns (b, l, d)."""
    kernel = KERNELS.get("add gated") if x.is_cuda and torch.is_grad_enabled() else None  # fuses only the backward pass
    result: Tensor = torch.addcmul(x, gate, y) if kernel is None else kernel(x, gate, y)
    return result


def add_and_modulate(
    x: Tensor, gate: Tensor, y: Tensor, gain: Tensor, shift: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Ends a residual branch and begins the next: `add_gated`, then `modulate` of its result.

    Returns:
        Both results, each (b, l, d). The second counts as `cheap`.
    """
    kernel = KERNELS.get("add and modulate") if x.is_cuda else None
    if kernel is None:
        x = add_gated(x, gate, y)
        return x, cheap(modulate, x, gain, shift, dtype)
    x, modulated = kernel(x, gate, y, gain, shift, NORM_EPS, dtype or torch.promote_types(x.dtype, gain.dtype))
    mark_cheap(modulated, modulate, x, gain, shift, dtype)
    return x, modulated
