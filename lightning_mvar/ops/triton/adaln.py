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


@torch.library.custom_op("lightning_mvar::add_and_modulate", mutates_args=())
def add_and_modulate(
    x: Tensor, gate: Tensor, y: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the result of `add_gated`, and its `modulate` in `dtype`; x, y (b, l, d), gate, gain, shift (b, 1, d)."""
    x, y = x.contiguous(), y.contiguous()
    b, l, d = x.shape
    added, out, tile = torch.empty_like(x), x.new_empty(b, l, d, dtype=dtype), tile_sizes(d)
    with torch.cuda.device_of(x):
        add_and_modulate_kernel[triton.cdiv(l, tile["ROWS"]), b](
            x, gate, y, gain, shift, added, out, l, d, gate.stride(0), gain.stride(0), shift.stride(0), eps,
            **tile, num_warps=8,
        )  # fmt: skip
    return added, out


@torch.library.custom_op("lightning_mvar::add_and_modulate_backward", mutates_args=())
def add_and_modulate_backward(
    dadded: Tensor, dout: Tensor, added: Tensor, gate: Tensor, y: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x and y (b, l, d), and of gate, gain and shift (b, 3, d) in float32."""
    added, y, dadded, dout = (t.contiguous() for t in (added, y, dadded, dout))
    b, l, d = added.shape
    tile = tile_sizes(d)
    dx, dy = torch.empty_like(added), torch.empty_like(y)
    partial = added.new_empty(b, num_blocks(l, tile), 3, d, dtype=torch.float32)
    with torch.cuda.device_of(added):
        add_and_modulate_backward_kernel[partial.shape[1], b](
            dadded, dout, added, gate, y, gain, dx, dy, partial, l, d, gate.stride(0), gain.stride(0), eps,
            **tile, num_warps=8,
        )  # fmt: skip
    return dx, dy, partial.sum(1)


def tile_sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE_ELEMENTS // block), "BLOCK": block}


def num_blocks(length: int, tile: dict[str, int]) -> int:
    return min(MAX_BLOCKS, triton.cdiv(length, tile["ROWS"]))


@triton.jit
def load_row(pointer, c, width):
    return tl.load(pointer + c, mask=c < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_rows(pointer, offsets, inside):
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normalize(value, inside, width, eps):
    """Returns rows of LayerNorm without affine, and the inverse of their standard deviations (rows, 1)."""
    centered = tl.where(inside, value - (tl.sum(value, 1) / width)[:, None], 0.0)
    inverse = (1 / tl.sqrt(tl.sum(centered * centered, 1) / width + eps))[:, None]
    return centered * inverse, inverse


@triton.jit
def normalize_backward(dnormed, normed, inverse, width):
    along = (tl.sum(dnormed * normed, 1) / width)[:, None]
    return (dnormed - (tl.sum(dnormed, 1) / width)[:, None] - normed * along) * inverse


@triton.jit
def modulate_kernel(
    x, gain, shift, out, length, width, gain_batch, shift_batch, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    image, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (t < length)[:, None] & (c < width)[None, :]
    offsets = (image * length + t[:, None]) * width + c[None, :]
    normed, _ = normalize(load_rows(x, offsets, inside), inside, width, eps)
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
        normed, inverse = normalize(load_rows(x, offsets, inside), inside, width, eps)
        gradient = load_rows(dout, offsets, inside)
        dgain += tl.sum(gradient * normed, 0)
        dshift += tl.sum(gradient, 0)
        tl.store(dx + offsets, normalize_backward(gradient * scale, normed, inverse, width), mask=inside)
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
        gradient = load_rows(dout, offsets, inside)
        dgate += tl.sum(gradient * load_rows(y, offsets, inside), 0)
        tl.store(dy + offsets, gradient * factor, mask=inside)
    tl.store(partial + (image * tl.num_programs(0) + tl.program_id(0)) * width + c, dgate, mask=c < width)


@triton.jit
def add_and_modulate_kernel(
    x, gate, y, gain, shift, added, out, length, width, gate_batch, gain_batch, shift_batch, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (t < length)[:, None] & (c < width)[None, :]
    offsets = (image * length + t[:, None]) * width + c[None, :]
    factor = load_row(gate + image * gate_batch, c, width)
    total = load_rows(x, offsets, inside) + factor * load_rows(y, offsets, inside)
    total = total.to(added.dtype.element_ty)  # normalized as stored: `modulate` of the sum computes the same
    tl.store(added + offsets, total, mask=inside)
    normed, _ = normalize(total.to(tl.float32), inside, width, eps)
    scale, offset = load_row(gain + image * gain_batch, c, width), load_row(shift + image * shift_batch, c, width)
    tl.store(out + offsets, normed * scale + offset, mask=inside)


@triton.jit
def add_and_modulate_backward_kernel(
    dadded, dout, added, gate, y, gain, dx, dy, partial, length, width, gate_batch, gain_batch, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    factor, scale = load_row(gate + image * gate_batch, c, width), load_row(gain + image * gain_batch, c, width)
    dgate, dgain = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS):
        t = first + tl.arange(0, ROWS)
        inside = (t < length)[:, None] & (c < width)[None, :]
        offsets = (image * length + t[:, None]) * width + c[None, :]
        normed, inverse = normalize(load_rows(added, offsets, inside), inside, width, eps)
        gradient = load_rows(dout, offsets, inside)
        dgain += tl.sum(gradient * normed, 0)
        dshift += tl.sum(gradient, 0)
        total = load_rows(dadded, offsets, inside) + normalize_backward(gradient * scale, normed, inverse, width)
        dgate += tl.sum(total * load_rows(y, offsets, inside), 0)
        tl.store(dx + offsets, total, mask=inside)
        tl.store(dy + offsets, total * factor, mask=inside)
    sums = partial + (image * tl.num_programs(0) + tl.program_id(0)) * 3 * width + c
    tl.store(sums, dgate, mask=c < width)
    tl.store(sums + width, dgain, mask=c < width)
    tl.store(sums + 2 * width, dshift, mask=c < width)


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


@add_and_modulate.register_fake
def _(
    x: Tensor, gate: Tensor, y: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


@add_and_modulate_backward.register_fake
def _(
    dadded: Tensor, dout: Tensor, added: Tensor, gate: Tensor, y: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return added.new_empty(y.shape), y.new_empty(y.shape), y.new_empty(len(y), 3, y.shape[2], dtype=torch.float32)


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


def save_add_and_modulate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gate, y, gain, shift, ctx.eps, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(output[0], gate, y, gain)


def differentiate_add_and_modulate(ctx: Any, dadded: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    added, gate, y, gain = ctx.saved_tensors
    dx, dy, sums = add_and_modulate_backward(dadded, dout, added, gate, y, gain, ctx.eps)
    dgate, dgain, dshift = sums.split(1, dim=1)
    return dx, dgate.to(gate.dtype), dy, dgain.to(gain.dtype), dshift.to(ctx.shift_dtype), None, None


add_and_modulate.register_autograd(differentiate_add_and_modulate, setup_context=save_add_and_modulate)
modulate.register_autograd(differentiate_modulate, setup_context=save_modulate)
add_gated.register_autograd(differentiate_add_gated, setup_context=save_add_gated)
