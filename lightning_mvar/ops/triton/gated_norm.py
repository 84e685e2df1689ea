"""Gated RMSNorm, a few rows per program; the reference is `ops.gated_norm.gated_rms_norm`.

Shapes: b batch, l tokens, r = b l rows, c channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048
MAX_PROGRAMS = 512  # in backward, each keeps one row of the weight's gradient; the same on every device


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes rms_norm(y silu(z)) weight in float32.

    Args:
        y: (b, l, c) contiguous.
        z: (b, l, c), contiguous channels.
        weight: (c,).
        eps: added to the mean square.

    Returns:
        (b, l, c) in the dtype of `z`.
    """
    b, l, c = y.shape
    out = z.new_empty(b, l, c)
    tile = tile_sizes(c)
    gated_norm_kernel[(triton.cdiv(b * l, tile["ROWS"]),)](
        y, z, weight, out, b * l, l, c, z.stride(0), z.stride(1), eps, **tile, num_warps=8
    )
    return out


def gated_norm_backward(
    dout: Tensor, dz: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of `z` to `dz` (b, l, c), a slice of a larger gradient.

    Args:
        dout: (b, l, c) contiguous gradient of the result.
        dz: where to write the gradient of `z`, contiguous channels.
        y, z, weight, eps: as in `gated_norm`.

    Returns:
        Gradients of y (b, l, c), in its dtype, and of the weight (c,), in float32.
    """
    b, l, c = y.shape
    dy, rows, tile = torch.empty_like(y), b * l, tile_sizes(c)
    partial = y.new_empty(min(triton.cdiv(rows, tile["ROWS"]), MAX_PROGRAMS), c, dtype=torch.float32)
    gated_norm_backward_kernel[(len(partial),)](
        dout, dy, dz, partial, y, z, weight, rows, l, c, z.stride(0), z.stride(1), dz.stride(0), dz.stride(1), eps,
        **tile, num_warps=8,
    )  # fmt: skip
    return dy, partial.sum(0)


def tile_sizes(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"ROWS": max(1, TILE_ELEMENTS // block), "BLOCK": block}


@triton.jit
def row_offsets(row, length, batch, token):
    """Returns (r, 1) offsets of the rows of a tensor with these strides of images and tokens."""
    return ((row // length) * batch + (row % length) * token)[:, None]


@triton.jit
def gated_norm_kernel(
    y, z, weight, out, rows, length, channels, z_batch, z_token, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    packed = row[:, None] * channels + c[None, :]
    value = tl.load(y + packed, mask=inside, other=0.0).to(tl.float32)
    logit = tl.load(z + row_offsets(row, length, z_batch, z_token) + c[None, :], mask=inside, other=0.0).to(tl.float32)
    gated = value * logit * tl.sigmoid(logit)
    inverse = 1 / tl.sqrt(tl.sum(gated * gated, 1) / channels + eps)
    scale = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    tl.store(out + packed, gated * inverse[:, None] * scale[None, :], mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    dout, dy, dz, partial, y, z, weight, rows, length, channels, z_batch, z_token, dz_batch, dz_token, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    scale = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    dscale = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        packed = row[:, None] * channels + c[None, :]
        value = tl.load(y + packed, mask=inside, other=0.0).to(tl.float32)
        source = z + row_offsets(row, length, z_batch, z_token) + c[None, :]
        logit = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dout + packed, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(logit)
        gate = logit * sigmoid
        gated = value * gate
        inverse = (1 / tl.sqrt(tl.sum(gated * gated, 1) / channels + eps))[:, None]
        normed = gated * inverse
        dscale += tl.sum(gradient * normed, 0)
        dnormed = gradient * scale
        dgated = (dnormed - normed * (tl.sum(dnormed * normed, 1) / channels)[:, None]) * inverse
        tl.store(dy + packed, dgated * gate, mask=inside)
        dlogit = dgated * value * (sigmoid + gate * (1 - sigmoid))
        tl.store(dz + row_offsets(row, length, dz_batch, dz_token) + c[None, :], dlogit, mask=inside)
    tl.store(partial + tl.program_id(0) * channels + c, dscale, mask=c < channels)
