"""State-space duality, the Mamba-2 scan: one recurrence, three ways to compute it.

For each head h, with a scalar decay, and B and C shared by all heads (Mamba-2, arXiv 2405.21060, sections 5 and 6):

    S_t = exp(dt_t A_h) S_{t-1} + dt_t x_t B_t^T          S: (p, n)
    y_t = S_t C_t                                         y: (p,)

| paper     | here            | meaning                                             |
|-----------|-----------------|-----------------------------------------------------|
| X         | x               | input of each head                                  |
| Delta     | dt              | step size, after softplus                           |
| A         | A               | decay rate of each head, negative                   |
| B, C      | B, C            | input and output projections of the state           |
| H, h_t    | state           | recurrent state                                     |
| L         | `decay_between` | decay from token to token inside a chunk            |

Shapes: b batch, l tokens, h heads, p head dim, n SSM state; in the chunked form, q tokens per chunk.

Where this package's Triton kernels cannot run, `ssd` runs `ssd_chunked` on a CPU and `ssd_batched` on a GPU.
`ssd_recurrent` is the definition, and the reference for tests. All of them take the state before the first token and
return the state after the last, so a long sequence can be computed in pieces. The state is always float32, because it
accumulates over the full sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_SIZE = 64
MIN_LOG_DECAY = -80.0  # smaller decays are negligible, and denormals are slow


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes the recurrence with PyTorch operations, in the form that suits the device of `x`.

    Args:
        x: (b, l, h, p) input, any floating dtype.
        dt: (b, l, h) float32 step sizes, positive.
        A: (h,) float32 decay rates, negative.
        B: (b, l, n) input projections, dtype of `x`.
        C: (b, l, n) output projections, dtype of `x`.
        state: (b, h, p, n) float32 state before the first token; None for zeros.

    Returns:
        y (b, l, h, p) in the dtype of `x`, and the state after the last token (b, h, p, n) in float32.
    """
    few_launches = x.is_cuda and x.shape[1] > CHUNK_SIZE
    return (ssd_batched if few_launches else ssd_chunked)(x, dt, A, B, C, state)


def ssd_recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence token by token (slow reference); same arguments and results as `ssd`."""
    b, l, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1], dtype=torch.float32) if state is None else state
    outputs = []
    for t in range(l):
        decay = torch.exp(dt[:, t] * A)  # (b, h)
        update = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t].float(), B[:, t].float())
        state = decay[..., None, None] * state + update
        outputs.append(torch.einsum("bhpn,bn->bhp", state, C[:, t].float()))
    return torch.stack(outputs, dim=1).to(x.dtype), state


def ssd_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence as matrix products over chunks (paper, section 6): linear in l, any l, with autograd.

    Arguments and results as in `ssd`. `chunk_size`, the maximum chunk length, trades the (q, q) products
    inside a chunk for the number of states. Products run in the dtype of `x`, decays and states in float32. Only the
    arguments are saved for the backward pass.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float32)
    return ChunkedScan.apply(x, dt, A, B, C, state, chunk_size)


def ssd_batched(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence with all chunks in one batch: few operations whatever the length, as suits GPUs.

    Arguments and results as in `ssd`. The backward pass recomputes the forward pass.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float32)
    y, final = checkpoint(scan_all_chunks, x, dt, A, B, C, state, use_reentrant=False, preserve_rng_state=False)
    return y, final


def scan_all_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `ssd_batched` over k chunks; the last one is padded with tokens of step size 0."""
    length, dtype, heads = x.shape[1], x.dtype, x.shape[2:]
    count = -(-length // CHUNK_SIZE)
    size = min(length, CHUNK_SIZE)
    x, dt, B, C = (pad_tokens(t, count * size).unflatten(1, (count, size)) for t in (x, dt, B, C))  # (b, k, q, ...)
    decay = (dt * A).cumsum(2)  # (b, k, q, h)
    inputs, by_head = scale_heads(x, dt), decay.transpose(2, 3)
    between = (by_head[..., :, None] - by_head[..., None, :]).clamp(MIN_LOG_DECAY, 0).exp()  # (b, k, h, q, q)
    scores = (C.float() @ B.float().transpose(2, 3)).tril()[:, :, None]  # (b, k, 1, q, q)
    inside = ((between * scores).to(dtype) @ inputs.transpose(2, 3)).transpose(2, 3)  # (b, k, q, h, p)

    # The state before chunk i is the sum over j <= i of the update by chunk j - 1, decayed from there to i. Decays add
    # up over the whole sequence, so their differences need float64.
    to_end = clamped_exp(decay[:, :, -1:] - decay)
    updates = B.transpose(2, 3) @ scale_heads(inputs, to_end).flatten(3)  # (b, k, n, h p)
    updates = torch.cat([state.permute(0, 3, 1, 2).flatten(2)[:, None], updates.float()], dim=1)  # (b, k + 1, n, h p)
    total = F.pad(decay[:, :, -1].double().cumsum(1), (0, 0, 1, 0)).transpose(1, 2)  # (b, h, k + 1)
    weights = (total[..., :, None] - total[..., None, :]).clamp(MIN_LOG_DECAY, 0).exp().tril().float()
    states = torch.einsum("bhij,bjnhp->binhp", weights, updates.unflatten(3, heads))
    carried = (C @ states[:, :-1].flatten(3).to(dtype)).unflatten(3, heads)  # (b, k, q, h, p)
    y = torch.addcmul(inside, carried, clamped_exp(decay)[..., None].to(dtype))
    return y.flatten(1, 2)[:, :length], states[:, -1].permute(0, 2, 3, 1)


def pad_tokens(t: Tensor, length: int) -> Tensor:
    """Pads (b, l, ...) by zeros to `length` tokens."""
    missing = length - t.shape[1]
    return F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)) if missing else t


class Chunk(NamedTuple):
    """Consecutive tokens of the sequence."""

    x: Tensor  # (b, q, h, p)
    dt: Tensor  # (b, q, h)
    B: Tensor  # (b, q, n)
    C: Tensor  # (b, q, n)
    decay: Tensor  # (b, q, h) log of the decay from the chunk's start to each token

    @property
    def inputs(self) -> Tensor:
        """Returns (b, q, h, p), the contribution of each token to the state."""
        return scale_heads(self.x, self.dt)

    @property
    def from_start(self) -> Tensor:
        """Returns (b, q, h), the decay from the chunk's start to each token."""
        return clamped_exp(self.decay)

    @property
    def to_end(self) -> Tensor:
        """Returns (b, q, h), the decay from each token to the chunk's end."""
        return clamped_exp(self.decay[:, -1:] - self.decay)

    @property
    def scores(self) -> Tensor:
        """Returns (b, 1, q, q): C_t . B_s for s <= t, else 0. Cheap enough for float32, except under autocast."""
        return (self.C.float() @ self.B.float().transpose(1, 2)).tril_()[:, None]

    def decay_between(self) -> Tensor:
        """Returns (b, h, q, q), the decay from token s to t for s <= t; 1 for s > t, where `scores` is 0 anyway."""
        decay = self.decay.transpose(1, 2).contiguous()  # strides would prevent vectorization
        return (decay[..., :, None] - decay[..., None, :]).clamp_(MIN_LOG_DECAY, 0).exp_()

    def carry(self, state: Tensor, inputs: Tensor) -> Tensor:
        """Returns the state (b, n, h, p) after the chunk, given the state before it."""
        update = self.B.transpose(1, 2) @ scale_heads(inputs, self.to_end).flatten(2)  # (b, n, h p)
        return update.unflatten(2, inputs.shape[2:]).float().addcmul_(state, clamped_exp(self.decay[:, -1:, :, None]))


class ChunkedScan(torch.autograd.Function):
    """Processes one chunk at a time, so that the (q, q) products of all heads stay in a CPU's cache.

    The internal state layout is (b, n, h, p): state updates and outputs are then single matrix products over all heads
    that need no transposed tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, dt, A, B, C, state)
        ctx.chunk_size = chunk_size
        ctx.set_materialize_grads(False)
        state, dtype, heads = state.permute(0, 3, 1, 2), x.dtype, x.shape[2:]
        outputs = torch.empty_like(x)
        for chunk, y in zip(chunks(x, dt, A, B, C, chunk_size), split(outputs, chunk_size), strict=True):
            inputs = chunk.inputs
            mixing = chunk.decay_between().mul_(chunk.scores).to(dtype)  # (b, h, q, q)
            inside = (mixing @ inputs.transpose(1, 2)).transpose(1, 2)  # (b, q, h, p) from the chunk's own tokens
            carried = (chunk.C @ state.flatten(2).to(dtype)).unflatten(2, heads)  # from earlier tokens
            torch.addcmul(inside, carried, chunk.from_start[..., None].to(dtype), out=y)
            state = chunk.carry(state, inputs)
        return outputs, state.permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        """Recomputes the state before each chunk, then processes chunks in reverse. `dT` is the gradient of T."""
        x, dt, A, B, C, state = ctx.saved_tensors
        parts, size = chunks(x, dt, A, B, C, ctx.chunk_size), ctx.chunk_size
        states = [state.permute(0, 3, 1, 2)]
        for chunk in parts[:-1]:
            states.append(chunk.carry(states[-1], chunk.inputs))
        dy = torch.zeros_like(x) if dy is None else dy
        dstate = torch.zeros_like(states[0]) if dstate is None else dstate.permute(0, 3, 1, 2)
        gradients = [torch.empty_like(t) for t in (x, dt, B, C)]
        dA = torch.zeros_like(A)
        pieces = zip(parts, states, split(dy, size), *(split(t, size) for t in gradients), strict=True)
        for chunk, state_before, dy_chunk, *targets in reversed(list(pieces)):
            *chunk_gradients, ddecay, dstate = chunk_backward(chunk, state_before, dy_chunk, dstate)
            # `decay` is a cumulative sum of dt A: each summand affects all later tokens.
            ddecay = ddecay.flip(1).cumsum(1).flip(1)
            chunk_gradients[1] = chunk_gradients[1] + A * ddecay
            dA += (chunk.dt * ddecay).sum((0, 1))
            for target, gradient in zip(targets, chunk_gradients, strict=True):
                target.copy_(gradient)
        dx, ddt, dB, dC = gradients
        return dx, ddt, dA, dB, dC, dstate.permute(0, 2, 3, 1), None


def chunk_backward(chunk: Chunk, state: Tensor, dy: Tensor, dafter: Tensor) -> tuple[Tensor, ...]:
    """Returns gradients of x, dt (except through the decay), B, C, decay, and the state before the chunk.

    Args:
        chunk: the chunk.
        state: (b, n, h, p) state before the chunk.
        dy: (b, q, h, p) gradient of the outputs.
        dafter: (b, n, h, p) gradient of the state after the chunk.
    """
    dtype, heads, inputs, scores = chunk.x.dtype, chunk.x.shape[2:], chunk.inputs, chunk.scores
    from_start, to_end = chunk.from_start, chunk.to_end
    dy_heads, inputs_heads = dy.transpose(1, 2), inputs.transpose(1, 2)  # (b, h, q, p)

    # Inside the chunk: y_t += sum over s of scores_ts decay_ts inputs_s.
    between = chunk.decay_between()
    dinside = ((between * scores).to(dtype).transpose(-1, -2) @ dy_heads).transpose(1, 2)
    dmixing = between.mul_(dy_heads @ inputs_heads.transpose(-1, -2))  # gradient of the scores, per head
    dscores = dmixing.sum(1).tril_().to(dtype)
    dmixing.mul_(scores)
    ddecay = (dmixing.sum(-1) - dmixing.sum(-2)).transpose(1, 2)  # (b, q, h)

    # From the state before: y_t += from_start_t C_t state.
    flat, dflat = state.flatten(2).to(dtype), dafter.flatten(2).to(dtype)  # (b, n, h p)
    dcarried = scale_heads(dy, from_start)
    ddecay = ddecay + (dcarried * (chunk.C @ flat).unflatten(2, heads)).sum(-1, dtype=torch.float32)

    # To the state after: sum over s of to_end_s B_s inputs_s, plus the decayed state before.
    ended = scale_heads(inputs, to_end)
    dended = (chunk.B @ dflat).unflatten(2, heads)
    dto_end = (ended * dended).sum(-1, dtype=torch.float32)
    kept = from_start[:, -1:]
    ddecay = ddecay - dto_end
    ddecay[:, -1:] += dto_end.sum(1, keepdim=True) + kept * (state * dafter).sum((1, 3))[:, None]
    dstate = torch.addcmul(
        (chunk.C.transpose(1, 2) @ dcarried.flatten(2)).unflatten(2, heads).float(), dafter, kept[..., None]
    )

    dinputs = torch.addcmul(dinside, dended, to_end[..., None].to(dtype))
    dB = ended.flatten(2) @ dflat.transpose(1, 2) + dscores.transpose(1, 2) @ chunk.C
    dC = dcarried.flatten(2) @ flat.transpose(1, 2) + dscores @ chunk.B
    return scale_heads(dinputs, chunk.dt), (chunk.x * dinputs).sum(-1, dtype=torch.float32), dB, dC, ddecay, dstate


def split(t: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    """Splits along the tokens into the fewest, nearly equal parts of at most `chunk_size`."""
    count = -(-t.shape[1] // chunk_size)
    return t.tensor_split(count, dim=1)


def chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> list[Chunk]:
    parts = zip(*(split(t, chunk_size) for t in (x, dt, B, C)), strict=True)
    return [Chunk(x, dt, B, C, (dt * A).cumsum(1)) for x, dt, B, C in parts]


def clamped_exp(decay: Tensor) -> Tensor:
    """Returns exp(decay), at least e^MIN_LOG_DECAY; any shape."""
    return decay.clamp(min=MIN_LOG_DECAY).exp_()


def scale_heads(t: Tensor, factor: Tensor) -> Tensor:
    """Multiplies (b, q, h, p) by (b, q, h), in the dtype of `t`."""
    return t * factor[..., None].to(t.dtype)
