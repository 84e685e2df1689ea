"""AdaLN in one kernel per use; the reference is `ops.adaln`.

Shapes: b batch, l tokens, d width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 4096
MAX_BLOCKS = 32  # per image in backward: each keeps one row of the gradients of gate, gain and shift


@torch.library.custom_op("lightning_mvar::modulate", mutates_args=())
def modulate(x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Computes LayerNorm(x) * gain + shift in float32; x (b, l, d), gain and shift (b, 1, d); returns `dtype`."""
    x = x.contiguous()
    b, l, d = x.shape
    out, tile = x.new_empty(b, l, d, dtype=dtype), tile_sizes(d)
    with torch.cuda.device_of(x):
        modulate_kernel[triton.cdiv(l, tile["ROWS"]), b](
            x, gain, shift, out, l, d, gain.stride(0), shift.stride(0), eps, **tile, num_warps=8
        )
    return out


@torch.library.custom_op("lightning_mvar::modulate_backward", mutates_args=())
def modulate_backward(dout: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x, and of gain and shift (b, 2, d) in float32."""
    x, dout = x.contiguous(), dout.contiguous()
    b, l, d = x.shape
    tile = tile_sizes(d)
    dx, partial = torch.empty_like(x), x.new_empty(b, num_blocks(l, tile), 2, d, dtype=torch.float32)
    with torch.cuda.device_of(x):
        modulate_backward_kernel[partial.shape[1], b](
            dout, x, gain, dx, partial, l, d, gain.stride(0), eps, **tile, num_warps=8
        )
    return dx, partial.sum(1)


@torch.library.custom_op("lightning_mvar::add_gated_backward", mutates_args=())
def add_gated_backward(dout: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate (b, d), in float32, and of y (b, l, d), for x + gate * y."""
    y, dout = y.contiguous(), dout.contiguous()
    b, l, d = y.shape
    tile = tile_sizes(d)
    dy, partial = torch.empty_like(y), y.new_empty(b, num_blocks(l, tile), d, dtype=torch.float32)
    with torch.cuda.device_of(y):
        add_gated_backward_kernel[partial.shape[1], b](
            dout, gate, y, dy, partial, l, d, gate.stride(0), **tile, num_warps=8
        )
    return partial.sum(1), dy


@torch.library.custom_op("lightning_mvar::add_gated", mutates_args=())
def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Computes x + gate * y in the dtype of x; x and y (b, l, d), gate (b, 1, d)."""
    return torch.addcmul(x, gate, y)


def tile_sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE_ELEMENTS // block), "BLOCK": block}


def num_blocks(length: int, tile: dict[str, int]) -> int:
    return min(MAX_BLOCKS, triton.cdiv(length, tile["ROWS"]))


@triton.jit
def load_row(pointer, c, width):
    return tl.load(pointer + c, mask=c < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalize(x, offsets, inside, width, eps):
    """Returns rows of LayerNorm without affine, and the inverse of their standard deviations (rows, 1)."""
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - (tl.sum(value, 1) / width)[:, None], 0.0)
    inverse = (1 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps))[:, None]
    return centred * inverse, inverse


@triton.jit
def modulate_kernel(
    x, gain, shift, out, length, width, gain_batch, shift_batch, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    image, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (t < length)[:, None] & (c < width)[None, :]
    offsets = (image * length + t[:, None]) * width + c[None, :]
    normed, _ = normalize(x, offsets, inside, width, eps)
    scale, offset = load_row(gain + image * gain_batch, c, width), load_row(shift + image * shift_batch, c, width)
    tl.store(out + offsets, normed * scale + offset, mask=inside)


@triton.jit
def modulate_backward_kernel(
    dout, x, gain, dx, partial, length, width, gain_batch, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    image, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    scale = load_row(gain + image * gain_batch, c, width)
    dgain, dshift = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS):
        t = first + tl.arange(0, ROWS)
        inside = (t < length)[:, None] & (c < width)[None, :]
        offsets = (image * length + t[:, None]) * width + c[None, :]
        normed, inverse = normalize(x, offsets, inside, width, eps)
        gradient = tl.load(dout + offsets, mask=inside, other=0.0).to(tl.float32)
        dgain += tl.sum(gradient * normed, 0)
        dshift += tl.sum(gradient, 0)
        dnormed = gradient * scale
        along = (tl.sum(dnormed * normed, 1) / width)[:, None]
        tl.store(
            dx + offsets, (dnormed - (tl.sum(dnormed, 1) / width)[:, None] - normed * along) * inverse, mask=inside
        )
    sums = partial + (image * tl.num_programs(0) + tl.program_id(0)) * 2 * width + c
    tl.store(sums, dgain, mask=c < width)
    tl.store(sums + width, dshift, mask=c < width)


@triton.jit
def add_gated_backward_kernel(
    dout, gate, y, dy, partial, length, width, gate_batch, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    image, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    factor = load_row(gate + image * gate_batch, c, width)
    dgate = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS):
        t = first + tl.arange(0, ROWS)
        inside = (t < length)[:, None] & (c < width)[None, :]
        offsets = (image * length + t[:, None]) * width + c[None, :]
        gradient = tl.load(dout + offsets, mask=inside, other=0.0).to(tl.float32)
        dgate += tl.sum(gradient * tl.load(y + offsets, mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(dy + offsets, gradient * factor, mask=inside)
    tl.store(partial + (image * tl.num_programs(0) + tl.program_id(0)) * width + c, dgate, mask=c < width)


@modulate.register_fake
def _(x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@modulate_backward.register_fake
def _(dout: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), 2, x.shape[2], dtype=torch.float32)


@add_gated.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@add_gated_backward.register_fake
def _(dout: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(len(y), y.shape[2], dtype=torch.float32), y.new_empty(y.shape)


def save_modulate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gain, shift, ctx.eps, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, gain)


def differentiate_modulate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, gain = ctx.saved_tensors
    dx, sums = modulate_backward(dout, x, gain, ctx.eps)
    dgain, dshift = sums.split(1, dim=1)
    return dx, dgain.to(gain.dtype), dshift.to(ctx.shift_dtype), None, None


def save_add_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, gate, y = inputs
    ctx.save_for_backward(gate, y)


def differentiate_add_gated(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    gate, y = ctx.saved_tensors
    dgate, dy = add_gated_backward(dout, gate, y)
    return dout, dgate[:, None].to(gate.dtype), dy


modulate.register_autograd(differentiate_modulate, setup_context=save_modulate)
add_gated.register_autograd(differentiate_add_gated, setup_context=save_add_gated)
