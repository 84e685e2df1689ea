"""The Mamba-2 scan, with softplus of the step sizes and the skip term D; the reference is `ops.ssd`.

One program per image and head processes the chunks in order, with the state in registers. In training, backward repeats
the forward pass and stores the state before each chunk; a second kernel then reads them from the last chunk to the
first.

| code           | meaning                                                         | shape  |
|----------------|-----------------------------------------------------------------|--------|
| raw_dt         | step sizes before the bias and softplus                         | (q,)   |
| decay          | log of the decay from the chunk's start to each token           | (q,)   |
| between        | decay from token s to token t for s <= t, else 0                | (q, q) |
| to_end         | decay from each token to the chunk's end                        | (q,)   |
| S              | state, transposed                                               | (n, p) |

Shapes: b batch, l tokens, h heads, p head dim, n SSM state, q tokens per chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class ScanInputs(NamedTuple):
    """Arguments of the scan. The activations may be slices: tokens and images have any stride."""

    x: Tensor  # (b, l, h, p), each token contiguous
    B: Tensor  # (b, l, n), contiguous channels, strides of x
    C: Tensor  # (b, l, n), contiguous channels, strides of x
    raw_dt: Tensor  # (b, l, h), contiguous heads
    dt_bias: Tensor  # (h,)
    A_log: Tensor  # (h,)
    D: Tensor  # (h,)
    state: Tensor | None  # (b, h, p, n) float32 contiguous, before the first token; None for zeros


def scan(inputs: ScanInputs, keep_states: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scans all tokens of all heads in one launch.

    Returns:
        y (b, l, h, p) in the dtype of `x`, the state after the last token (b, h, p, n) in float32, and with
        `keep_states` the states before each chunk (b, h, chunks, n, p) in float32.
    """
    x, n = inputs.x, inputs.B.shape[2]
    b, l, h, p = x.shape
    sizes = block_sizes(x.dtype, p, n)
    y, final = x.new_empty(b, l, h, p), x.new_empty(b, h, p, n, dtype=torch.float32)
    chunks = triton.cdiv(l, sizes["CHUNK"])
    states = x.new_empty(b, h, chunks, n, p, dtype=torch.float32) if keep_states else None
    scan_kernel[h, b](
        *inputs, y, final, states, l, x.stride(0), x.stride(1), inputs.raw_dt.stride(0), inputs.raw_dt.stride(1),
        P=p, N=n, **sizes, num_warps=4 if x.dtype.itemsize == 2 else 8, num_stages=1,
    )  # fmt: skip
    return y, final, states


def scan_backward(
    dy: Tensor, dfinal: Tensor | None, dx: Tensor, draw_dt: Tensor, inputs: ScanInputs, states: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Writes the gradients of x and raw_dt to `dx` and `draw_dt`, slices of larger gradients.

    Args:
        dy: (b, l, h, p) contiguous gradient of y.
        dfinal: (b, h, p, n) contiguous gradient of the final state; None for zeros.
        dx: (b, l, h, p), where to write the gradient of x, each token contiguous.
        draw_dt: (b, l, h), where to write the gradient of raw_dt, contiguous heads.
        inputs: as in `scan`.
        states: as returned by `scan`.

    Returns:
        Gradients of B and C for each head (b, l, h, 2, n) in the dtype of x; of dt_bias, A_log and D for each image
        (b, 3, h) in float32; and of the initial state, None without one.
    """
    x, n = inputs.x, inputs.B.shape[2]
    b, l, h, p = x.shape
    dBC, dheads = x.new_empty(b, l, h, 2, n), x.new_empty(b, 3, h, dtype=torch.float32)
    dstate = None if inputs.state is None else torch.empty_like(inputs.state)
    scan_backward_kernel[h, b](
        *inputs, dy, dfinal, states, dx, draw_dt, dBC, dheads, dstate, l,
        x.stride(0), x.stride(1), inputs.raw_dt.stride(0), inputs.raw_dt.stride(1),
        dx.stride(0), dx.stride(1), draw_dt.stride(0), draw_dt.stride(1),
        P=p, N=n, **block_sizes(x.dtype, p, n), num_warps=8, num_stages=1,
    )  # fmt: skip
    return dBC, dheads, dstate


def block_sizes(dtype: torch.dtype, p: int, n: int) -> dict[str, int]:
    """Returns tile sizes: powers of two of at least 16, small enough for registers and shared memory."""
    return {
        "CHUNK": 64 if dtype.itemsize == 2 else 32,
        "BLOCK_P": max(16, triton.next_power_of_2(p)),
        "BLOCK_N": max(16, triton.next_power_of_2(n)),
    }


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_tile(pointer, t, channel, t_stride, length, SIZE: tl.constexpr):
    """Loads (t, channel) of one image; zeros outside."""
    inside = (t < length)[:, None] & (channel < SIZE)[None, :]
    return tl.load(pointer + t[:, None] * t_stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(pointer, value, t, channel, t_stride, length, SIZE: tl.constexpr):
    inside = (t < length)[:, None] & (channel < SIZE)[None, :]
    tl.store(pointer + t[:, None] * t_stride + channel[None, :], value, mask=inside)


@triton.jit
def step_sizes(raw_dt, bias, t, t_stride, length):
    """Returns raw_dt + bias and its softplus, 0 outside; exact for small step sizes, unlike log(1 + e)."""
    raw = tl.load(raw_dt + t * t_stride, mask=t < length, other=0.0).to(tl.float32) + bias
    e = tl.exp(tl.minimum(raw, 20.0))
    u = 1 + e
    softplus = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))  # log1p(e)
    return raw, tl.where(t < length, tl.where(raw > 20, raw, softplus), 0.0)


@triton.jit
def decay_between(decay, q):
    """Returns exp(decay_t - decay_s) for s <= t, else 0, as (t, s)."""
    causal = q[:, None] >= q[None, :]
    return tl.where(causal, tl.exp(tl.where(causal, decay[:, None] - decay[None, :], 0.0)), 0.0)


@triton.jit
def scan_kernel(
    x, B, C, raw_dt, dt_bias, A_log, D, state, y, final, states, length, x_batch, x_token, dt_batch, dt_token,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, image, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    q, p, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x += image * x_batch + head * P
    B += image * x_batch
    C += image * x_batch
    raw_dt += image * dt_batch + head
    y += (image * length * heads + head) * P
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    bias, skip = tl.load(dt_bias + head).to(tl.float32), tl.load(D + head).to(tl.float32)
    transposed = n[:, None] + p[None, :] * N
    in_state = (n < N)[:, None] & (p < P)[None, :]
    S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if state is not None:
        S += tl.load(state + (image * heads + head) * P * N + transposed, mask=in_state, other=0.0)
    for first in range(0, length, CHUNK):
        t = first + q
        if states is not None:
            chunk = (image * heads + head) * tl.cdiv(length, CHUNK) + first // CHUNK
            tl.store(states + chunk * N * P + n[:, None] * P + p[None, :], S, mask=in_state)
        inputs = load_tile(x, t, p, x_token, length, P)
        keys, queries = load_tile(B, t, n, x_token, length, N), load_tile(C, t, n, x_token, length, N)
        _, dt = step_sizes(raw_dt, bias, t, dt_token, length)
        decay = tl.cumsum(dt * A, 0)
        end = tl.sum(dt * A, 0)
        scaled = (inputs * dt[:, None]).to(inputs.dtype)
        mixing = dot(queries, tl.trans(keys)) * decay_between(decay, q)
        out = dot(queries, S.to(inputs.dtype)) * tl.exp(decay)[:, None]
        out += dot(mixing.to(inputs.dtype), scaled) + skip * inputs
        store_tile(y, out, t, p, heads * P, length, P)
        ended = (keys * tl.exp(end - decay)[:, None]).to(inputs.dtype)
        S = S * tl.exp(end) + dot(tl.trans(ended), scaled)
    tl.store(final + (image * heads + head) * P * N + transposed, S, mask=in_state)


@triton.jit
def scan_backward_kernel(
    x, B, C, raw_dt, dt_bias, A_log, D, state, dy, dfinal, states, dx, draw_dt, dBC, dheads, dstate, length,
    x_batch, x_token, dt_batch, dt_token, dx_batch, dx_token, ddt_batch, ddt_token,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`dT` is the gradient of T; `dS` of the state after the chunk."""
    head, image, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    q, p, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x += image * x_batch + head * P
    B += image * x_batch
    C += image * x_batch
    raw_dt += image * dt_batch + head
    dy += (image * length * heads + head) * P
    dx += image * dx_batch + head * P
    draw_dt += image * ddt_batch + head
    dB = dBC + (image * length * heads + head) * 2 * N
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    bias, skip = tl.load(dt_bias + head).to(tl.float32), tl.load(D + head).to(tl.float32)
    transposed = n[:, None] + p[None, :] * N
    in_state = (n < N)[:, None] & (p < P)[None, :]
    dS = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if dfinal is not None:
        dS += tl.load(dfinal + (image * heads + head) * P * N + transposed, mask=in_state, other=0.0)
    dbias, dA, dskip = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for back in range(chunks):
        number = chunks - 1 - back
        t = number * CHUNK + q
        dtype = x.dtype.element_ty
        inputs, dout = load_tile(x, t, p, x_token, length, P), load_tile(dy, t, p, heads * P, length, P)
        keys, queries = load_tile(B, t, n, x_token, length, N), load_tile(C, t, n, x_token, length, N)
        raw, dt = step_sizes(raw_dt, bias, t, dt_token, length)
        decay = tl.cumsum(dt * A, 0)
        end = tl.sum(dt * A, 0)
        from_start, to_end = tl.exp(decay), tl.exp(end - decay)
        scaled = (inputs * dt[:, None]).to(dtype)

        # Inside the chunk: y_t += sum over s of scores_ts between_ts scaled_s.
        between = decay_between(decay, q)
        mixing = dot(queries, tl.trans(keys)) * between
        dmixing = dot(dout, tl.trans(scaled))
        dscaled = dot(tl.trans(mixing).to(dtype), dout)
        dscores = (dmixing * between).to(dtype)
        weighted = dmixing * mixing
        ddecay = tl.sum(weighted, 1) - tl.sum(weighted, 0)
        dkeys, dqueries = dot(tl.trans(dscores), queries), dot(dscores, keys)

        # From the state before: y_t += from_start_t C_t S.
        before = states + ((image * heads + head) * chunks + number) * N * P + n[:, None] * P + p[None, :]
        S = tl.load(before, mask=in_state, other=0.0)
        started = (dout * from_start[:, None]).to(dtype)
        carried = dot(started, tl.trans(S).to(dtype))
        ddecay += tl.sum(carried * queries, 1)
        dqueries += carried

        # To the state after: sum over s of to_end_s B_s scaled_s, plus the decayed state before.
        flat = dS.to(dtype)
        ended = dot((scaled * to_end[:, None]).to(dtype), tl.trans(flat))
        dto_end = tl.sum(ended * keys, 1)
        dend = tl.sum(dto_end, 0) + tl.exp(end) * tl.sum(tl.sum(S * dS, 1), 0)
        ddecay += tl.where(q == CHUNK - 1, dend, 0.0) - dto_end
        dkeys += ended
        dscaled += dot(keys, flat) * to_end[:, None]
        dS = dS * tl.exp(end) + dot(tl.trans(queries), started)

        # decay is a cumulative sum of dt A: each summand affects all later tokens.
        dlog = tl.cumsum(ddecay, 0, reverse=True)
        ddt = A * dlog + tl.sum(dscaled * inputs, 1)
        draw = tl.where(t < length, ddt * tl.where(raw > 20, 1.0, tl.sigmoid(raw)), 0.0)
        tl.store(draw_dt + t * ddt_token, draw, mask=t < length)
        store_tile(dx, dscaled * dt[:, None] + skip * dout, t, p, dx_token, length, P)
        store_tile(dB, dkeys, t, n, heads * 2 * N, length, N)
        store_tile(dB + N, dqueries, t, n, heads * 2 * N, length, N)
        dbias += draw
        dA += dlog * dt
        dskip += tl.sum(dout.to(tl.float32) * inputs, 1)
    sums = dheads + image * 3 * heads + head
    tl.store(sums, tl.sum(dbias, 0))
    tl.store(sums + heads, tl.sum(dA, 0) * A)  # dA / dA_log = A
    tl.store(sums + 2 * heads, tl.sum(dskip, 0))
    if dstate is not None:
        tl.store(dstate + (image * heads + head) * P * N + transposed, dS, mask=in_state)
