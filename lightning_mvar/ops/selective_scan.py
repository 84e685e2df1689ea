"""Selective scan of Mamba-1 (arXiv 2312.00752, section 3.2 and algorithm 2), with a separate state per channel.

    S_t = exp(dt_t A) * S_{t-1} + dt_t x_t B_t           per channel; S, A, B: (n,)
    y_t = S_t . C_t

| paper | here  | meaning                                                      |
|-------|-------|--------------------------------------------------------------|
| x     | x     | input of each channel                                        |
| Delta | dt    | step size of each channel, after softplus                    |
| A     | A     | decay rates, negative                                        |
| B, C  | B, C  | input and output projections, shared by all channels         |
| h     | state | recurrent state                                              |

Shapes: b batch, l tokens, c channels, n SSM state, q tokens per chunk.

Decays vary over both channels and states, so the recurrence is not a matrix product (Mamba-2 restricts the decays to
make it one); it runs as one fused multiply-add per token. It is a custom operator, so torch.compile does not unroll it
and its operations can be counted. Only the arguments and the state at the start of each chunk are saved for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_mvar.devices import without_autocast

CHUNK_SIZE = 64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # x, dt, B, C of consecutive tokens


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scans the tokens in float32, starting from `state`.

    Args:
        x: (b, l, c) input, any floating dtype.
        dt: (b, l, c) step sizes, positive.
        A: (c, n) decay rates, negative.
        B: (b, l, n) input projections.
        C: (b, l, n) output projections.
        state: (b, c, n) float32 state before the first token; None for zeros.

    Returns:
        y (b, l, c) in the dtype of `x`, and the state after the last token (b, c, n) in float32.
    """
    if state is None:
        state = x.new_zeros(len(x), *A.shape, dtype=torch.float32)
    y, states = scan_forward(x.float(), dt.float(), A.float(), B.float(), C.float(), state)
    return y.to(x.dtype), states[:, -1]


def selective_scan_recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence token by token (reference); same arguments and results as `selective_scan`."""
    state = x.new_zeros(len(x), *A.shape, dtype=torch.float32) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        update = torch.einsum("bc,bc,bn->bcn", dt[:, t].float(), x[:, t].float(), B[:, t].float())
        state = torch.exp(dt[:, t, :, None].float() * A) * state + update
        outputs.append(torch.einsum("bcn,bn->bc", state, C[:, t].float()))
    return torch.stack(outputs, dim=1).to(x.dtype), state


@torch.library.custom_op("lightning_mvar::selective_scan", mutates_args=())
def scan_forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y (b, l, c) and the states (b, chunks + 1, c, n) at the start of each chunk and after the last."""
    outputs, starts = [], [state]
    with without_autocast(x):  # which also reaches into custom operators
        for chunk in chunks(x, dt, B, C):
            states = states_after(chunk, A, starts[-1])
            outputs.append(torch.einsum("bqcn,bqn->bqc", states, chunk[3]))
            starts.append(states[:, -1])
    return torch.cat(outputs, dim=1), torch.stack(starts, dim=1)


@torch.library.custom_op("lightning_mvar::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of x, dt, A, B, C and the first state; recomputes states chunk by chunk, in reverse."""
    chunk_gradients: list[tuple[Tensor, ...]] = []
    dA, dstate = torch.zeros_like(A), dfinal
    pieces = zip(chunks(x, dt, B, C), dy.split(CHUNK_SIZE, dim=1), starts[:, :-1].unbind(1), strict=True)
    with without_autocast(x):
        for chunk, dy_chunk, start in reversed(list(pieces)):
            *gradients, dA_chunk, dstate = chunk_backward(chunk, A, start, dy_chunk, dstate)
            chunk_gradients.append(tuple(gradients))
            dA += dA_chunk
    dx, ddt, dB, dC = (torch.cat(parts[::-1], dim=1) for parts in zip(*chunk_gradients, strict=True))
    return dx, ddt, dA, dB, dC, dstate


def chunk_backward(chunk: Inputs, A: Tensor, start: Tensor, dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    """Returns gradients of x, dt, B, C, A and the initial state `start`, given those of the outputs and final state."""
    x, dt, B, C = chunk
    states = states_after(chunk, A, start)
    before = torch.cat([start[:, None], states[:, :-1]], dim=1)
    decay = (dt[..., None] * A).exp()
    dstates = torch.einsum("bqc,bqn->bqcn", dy, C)  # through the output; later states are added below
    for t in range(dstates.shape[1] - 1, -1, -1):
        dstates[:, t] += dstate
        dstate = dstates[:, t] * decay[:, t]
    dexponent = dstates * before * decay
    dinput = torch.einsum("bqcn,bqn->bqc", dstates, B)  # gradient of dt x
    ddt = torch.einsum("bqcn,cn->bqc", dexponent, A) + x * dinput
    dB = torch.einsum("bqcn,bqc->bqn", dstates, dt * x)
    dC = torch.einsum("bqc,bqcn->bqn", dy, states)
    return dt * dinput, ddt, dB, dC, torch.einsum("bqcn,bqc->cn", dexponent, dt), dstate


def chunks(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Iterator[Inputs]:
    return zip(*(t.split(CHUNK_SIZE, dim=1) for t in (x, dt, B, C)), strict=True)


def states_after(chunk: Inputs, A: Tensor, state: Tensor) -> Tensor:
    """Returns (b, q, c, n), the state after each token of a chunk."""
    x, dt, B, _ = chunk
    decay = (dt[..., None] * A).exp()
    states = torch.einsum("bqc,bqn->bqcn", dt * x, B)
    for t in range(states.shape[1]):
        state = states[:, t].addcmul_(state, decay[:, t])
    return states


@scan_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    num_chunks = -(-x.shape[1] // CHUNK_SIZE)
    return torch.empty_like(x), x.new_empty(len(x), num_chunks + 1, *A.shape)


@scan_backward.register_fake
def _(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, ...]:
    return *(torch.empty_like(t) for t in (x, dt, A, B, C)), torch.empty_like(dfinal)


def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dt, A, B, C, _ = inputs
    ctx.save_for_backward(x, dt, A, B, C, output[1])


def backward(ctx: Any, dy: Tensor, dstates: Tensor) -> tuple[Tensor, ...]:
    """Differentiates y and the last state, the only one that `selective_scan` returns."""
    gradients: tuple[Tensor, ...] = scan_backward(dy, dstates[:, -1].contiguous(), *ctx.saved_tensors)
    return gradients


scan_forward.register_autograd(backward, setup_context=save_inputs)


@register_flop_formula(torch.ops.lightning_mvar.selective_scan)
def flops(x: tuple[int, ...], dt: object, A: tuple[int, int], *_: object, **__: object) -> int:
    """Counts multiplications and additions of state and output."""
    return 4 * x[0] * x[1] * A[0] * A[1]
