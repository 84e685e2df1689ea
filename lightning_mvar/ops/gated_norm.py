"""Gated RMSNorm after the Mamba-2 scan (arXiv 2405.21060, section 7): rms_norm(y silu(z)) weight.

Shapes: r rows (tokens), c channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**18  # 1 MiB in float32: a block's intermediates stay in a CPU's cache


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes in float32, because the product can overflow float16; saves only the arguments for backward.

    Args:
        y, z: (..., c).
        weight: (c,).
        eps: added to the mean square.

    Returns:
        (..., c) in the dtype of `z`.
    """
    return GatedNorm.apply(y, z, weight, eps)


class GatedNorm(torch.autograd.Function):
    """Processes rows in blocks so that float32 intermediates stay in cache."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.eps = eps
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        weight = weight.float()
        for out_rows, y_rows, z_rows in row_blocks(out, y, z):
            gated = F.silu(z_rows.float()).mul_(y_rows)
            out_rows.copy_(gated.mul_(inverse_rms(gated, eps)).mul_(weight))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, z, weight = ctx.saved_tensors
        dy, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, z))
        scale, dscale = weight.float(), torch.zeros_like(weight, dtype=torch.float32)
        for dy_rows, dz_rows, *rows in row_blocks(dy, dz, dout, y, z):
            dout_rows, value, logit = (t.float() for t in rows)
            sigmoid = logit.sigmoid()
            gate = logit * sigmoid
            gated = value * gate
            inverse = inverse_rms(gated, ctx.eps)
            normed = gated * inverse
            dscale += (dout_rows * normed).sum(0)
            dnormed = dout_rows * scale
            dgated = (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)) * inverse
            dy_rows.copy_(dgated * gate)
            dz_rows.copy_(dgated * value * (sigmoid + gate * (1 - sigmoid)))
        return dy, dz, dscale.to(weight.dtype), None


def inverse_rms(rows: Tensor, eps: float) -> Tensor:
    """Returns 1 / RMS of each row: (r, c) -> (r, 1)."""
    return rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields matching row blocks (r, c) of tensors (..., c); a single block on a GPU, where each launch costs time."""
    flat = [t.flatten(0, -2) for t in tensors]
    num_rows = len(flat[0]) if flat[0].is_cuda else max(1, BLOCK_ELEMENTS // flat[0].shape[-1])
    return zip(*(t.split(num_rows) for t in flat), strict=True)
