"""Causal depthwise convolution and SiLU in one kernel; the reference is `F.silu` of `ops.conv.causal_conv`.

Shapes: b batch, l tokens, c channels, w taps. Inputs before the first token come from the state, which holds the last
w - 1 inputs of the previous call; `None` means zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS, BLOCK_CHANNELS = 32, 64


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes silu(bias + sum over j of weight_j x_{t - w + 1 + j}), with products and sums in float32.

    Args:
        x: (b, l, c), contiguous channels.
        weight: (c, w); the last tap applies to the current token.
        bias: (c,).
        state: (b, w - 1, c) inputs before the first token, in the dtype of `x`; None for zeros.

    Returns:
        y (b, l, c) and the last w - 1 inputs (b, w - 1, c), both in the dtype of `x`.
    """
    b, l, c = x.shape
    taps = weight.shape[1]
    y, new_state = x.new_empty(b, l, c), x.new_empty(b, taps - 1, c)
    grid = (triton.cdiv(l, BLOCK_TOKENS), triton.cdiv(c, BLOCK_CHANNELS), b)
    conv_kernel[grid](
        x, weight, bias, state, y, new_state, l, c, x.stride(0), x.stride(1),
        TAPS=taps, BLOCK_PAST=triton.next_power_of_2(taps), BLOCK_T=BLOCK_TOKENS, BLOCK_C=BLOCK_CHANNELS,
    )  # fmt: skip
    return y, new_state


def conv_silu_backward(
    dy: Tensor, dnew_state: Tensor | None, dx: Tensor, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Writes the gradient of `x` to `dx` (b, l, c), a slice of a larger gradient; the activation is recomputed.

    Args:
        dy: (b, l, c) contiguous gradient of y.
        dnew_state: (b, w - 1, c) contiguous gradient of the returned state; None for zeros.
        dx: where to write the gradient of `x`, contiguous channels.
        x, weight, bias, state: as in `conv_silu`.

    Returns:
        Gradients of weight and bias side by side, (c, w + 1) in float32, and of the state, None without one.
    """
    b, l, c = x.shape
    taps = weight.shape[1]
    blocks = triton.cdiv(l + taps - 1, BLOCK_TOKENS)
    partial = x.new_empty(b * blocks, c, taps + 1, dtype=torch.float32)
    dstate = None if state is None else torch.empty_like(state)
    conv_backward_kernel[blocks, triton.cdiv(c, BLOCK_CHANNELS), b](
        dy, dnew_state, dx, partial, dstate, x, weight, bias, state,
        l, c, x.stride(0), x.stride(1), dx.stride(0), dx.stride(1),
        TAPS=taps, BLOCK_T=BLOCK_TOKENS, BLOCK_C=BLOCK_CHANNELS,
    )  # fmt: skip
    return partial.sum(0), dstate


@triton.jit
def load_inputs(x, state, image, t, c, length, channels, x_batch, x_token, PAST: tl.constexpr):
    """Loads float32 inputs (t, c); tokens before the first come from the state."""
    inside = (c < channels)[None, :]
    here = (t >= 0) & (t < length)
    value = tl.load(x + image * x_batch + t[:, None] * x_token + c[None, :], mask=here[:, None] & inside, other=0.0)
    value = value.to(tl.float32)
    if state is not None:
        before = (t < 0) & (t >= -PAST)
        rows = image * PAST + t + PAST
        past = tl.load(state + rows[:, None] * channels + c[None, :], mask=before[:, None] & inside, other=0.0)
        value += past.to(tl.float32)
    return value


@triton.jit
def conv_kernel(
    x, weight, bias, state, y, new_state, length, channels, x_batch, x_token,
    TAPS: tl.constexpr, BLOCK_PAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PAST: tl.constexpr = TAPS - 1
    image = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(TAPS):
        tap = tl.load(weight + c * TAPS + j, mask=inside, other=0.0).to(tl.float32)
        total += tap[None, :] * load_inputs(x, state, image, t - PAST + j, c, length, channels, x_batch, x_token, PAST)
    target = y + (image * length + t[:, None]) * channels + c[None, :]
    tl.store(target, total * tl.sigmoid(total), mask=(t < length)[:, None] & inside[None, :])
    if (PAST > 0) & (tl.program_id(0) == 0):
        row = tl.arange(0, BLOCK_PAST)
        last = load_inputs(x, state, image, length - PAST + row, c, length, channels, x_batch, x_token, PAST)
        kept = new_state + (image * PAST + row[:, None]) * channels + c[None, :]
        tl.store(kept, last, mask=(row < PAST)[:, None] & inside[None, :])


@triton.jit
def conv_backward_kernel(
    dy, dnew_state, dx, partial, dstate, x, weight, bias, state,
    length, channels, x_batch, x_token, dx_batch, dx_token,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PAST: tl.constexpr = TAPS - 1
    image = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T) - PAST  # from the first token of the state
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if dnew_state is not None:
        row = t - (length - PAST)
        source = dnew_state + (image * PAST + row[:, None]) * channels + c[None, :]
        gradient += tl.load(source, mask=((row >= 0) & (row < PAST))[:, None] & inside[None, :], other=0.0).to(
            tl.float32
        )
    sums = partial + ((image * tl.num_programs(0) + tl.program_id(0)) * channels + c) * (TAPS + 1)
    for ahead in tl.static_range(TAPS):  # token t is an input of tokens t to t + w - 1
        u = t + ahead
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) + shift[None, :]
        for j in tl.static_range(TAPS):
            tap = tl.load(weight + c * TAPS + j, mask=inside, other=0.0).to(tl.float32)
            total += tap[None, :] * load_inputs(
                x, state, image, u - PAST + j, c, length, channels, x_batch, x_token, PAST
            )
        valid = ((u >= 0) & (u < length))[:, None] & inside[None, :]
        dtotal = tl.load(dy + (image * length + u[:, None]) * channels + c[None, :], mask=valid, other=0.0)
        sigmoid = tl.sigmoid(total)
        dtotal = dtotal.to(tl.float32) * sigmoid * (1 + total * (1 - sigmoid))
        gradient += tl.load(weight + c * TAPS + PAST - ahead, mask=inside, other=0.0).to(tl.float32)[None, :] * dtotal
        if ahead == 0:
            tl.store(sums + TAPS, tl.sum(dtotal, 0), mask=inside)
            for j in tl.static_range(TAPS):
                inputs = load_inputs(x, state, image, t - PAST + j, c, length, channels, x_batch, x_token, PAST)
                tl.store(sums + j, tl.sum(dtotal * inputs, 0), mask=inside)
    here = (t >= 0) & (t < length)
    target = dx + image * dx_batch + t[:, None] * dx_token + c[None, :]
    tl.store(target, gradient, mask=here[:, None] & inside[None, :])
    if dstate is not None:
        before = dstate + (image * PAST + t[:, None] + PAST) * channels + c[None, :]
        tl.store(before, gradient, mask=(t < 0)[:, None] & inside[None, :])
