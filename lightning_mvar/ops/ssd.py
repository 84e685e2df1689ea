"""State-space duality, the scan of Mamba-2: one recurrence, three ways to compute it.

For every head h, with a scalar decay and one B and C shared by all heads (Mamba-2, arXiv 2405.21060, sections 5 and 6):

    S_t = exp(dt_t A_h) S_{t-1} + dt_t x_t B_t^T          S: (p, n)
    y_t = S_t C_t                                         y: (p,)

| paper     | here            | meaning                                             |
|-----------|-----------------|-----------------------------------------------------|
| X         | x               | input of each head                                  |
| Delta     | dt              | step size, after softplus                           |
| A         | A               | decay rate of each head, negative                   |
| B, C      | B, C            | input and output projections of the state           |
| H, h_t    | state           | what is carried from token to token                 |
| L         | `decay_between` | decay from token to token inside a chunk            |

Shapes: b batch, l tokens, h heads, p head dim, n SSM state; in the chunked form q tokens of a chunk.

`ssd` is what networks call: the Triton kernels of mamba-ssm on CUDA where that package is installed, `ssd_chunked`
everywhere else. `ssd_recurrent` is the definition written out, and what the others are tested against. All of them
take the state before the first token and return the state after the last, so a long sequence can be computed piece by
piece. The state is float32 whatever the inputs are: it accumulates over the whole sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mvar.ops.kernels import FOUND

CHUNK_SIZE = 64
MIN_LOG_DECAY = -80.0  # less is as good as nothing, and numbers below the normal ones of float32 take long to make


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scan with the fastest implementation this machine has for the device of `x`.

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
    kernel = FOUND.get("scan") if x.is_cuda else None
    if kernel is None:
        return ssd_chunked(x, dt, A, B, C, state)
    y, final = kernel(
        x, dt, A, B[:, :, None], C[:, :, None], CHUNK_SIZE, initial_states=state, return_final_states=True
    )
    return y, final.float()


def ssd_recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: slow, plain, the reference. Arguments and results as in `ssd`."""
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
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The recurrence as matrix products over chunks of tokens (paper, section 6): linear in l, any l, autograd.

    Arguments and results as in `ssd`; `chunk_size`, the longest chunk, trades the (q, q) products inside a chunk for
    the number of states. Products run in the dtype of `x`, decays and states in float32. Nothing but the arguments is
    kept for the backward pass.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float32)
    return ChunkedScan.apply(x, dt, A, B, C, state, chunk_size)


class Chunk(NamedTuple):
    """Some consecutive tokens. `decay` (b, q, h) is the logarithm of the decay from the chunk's start to each token."""

    x: Tensor  # (b, q, h, p)
    dt: Tensor  # (b, q, h)
    B: Tensor  # (b, q, n)
    C: Tensor  # (b, q, n)
    decay: Tensor

    @property
    def inputs(self) -> Tensor:
        """(b, q, h, p) what each token adds to the state."""
        return scaled(self.x, self.dt)

    @property
    def from_start(self) -> Tensor:
        """(b, q, h) decay from the chunk's start to each token."""
        return exponential(self.decay)

    @property
    def to_end(self) -> Tensor:
        """(b, q, h) decay from each token to the chunk's end."""
        return exponential(self.decay[:, -1:] - self.decay)

    @property
    def scores(self) -> Tensor:
        """(b, 1, q, q): C_t . B_s for s <= t, else 0; but under autocast in float32, for it is small."""
        return (self.C.float() @ self.B.float().transpose(1, 2)).tril_()[:, None]

    def decay_between(self) -> Tensor:
        """(b, h, q, q): decay from token s to token t for s <= t; 1 where s is later, for `scores` are 0 there."""
        decay = self.decay.transpose(1, 2).contiguous()  # strided, it would keep the difference from being vectorised
        return (decay[..., :, None] - decay[..., None, :]).clamp_(MIN_LOG_DECAY, 0).exp_()

    def carry(self, state: Tensor, inputs: Tensor) -> Tensor:
        """The state (b, n, h, p) after the chunk, from that before it."""
        added = self.B.transpose(1, 2) @ scaled(inputs, self.to_end).flatten(2)  # (b, n, h p)
        return added.unflatten(2, inputs.shape[2:]).float().addcmul_(state, exponential(self.decay[:, -1:, :, None]))


class ChunkedScan(torch.autograd.Function):
    """One chunk after the other, so that the (q, q) products of all heads stay in a CPU's cache.

    Inside, the state is (b, n, h, p): what it takes and gives are then single matrix products for all heads, and
    tokens need not be transposed for them.
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
            carried = (chunk.C @ state.flatten(2).to(dtype)).unflatten(2, heads)  # and from those before
            torch.addcmul(inside, carried, chunk.from_start[..., None].to(dtype), out=y)
            state = chunk.carry(state, inputs)
        return outputs, state.permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        """`dT` is the gradient of T. The states before each chunk are computed again, then chunks run backwards."""
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
        for chunk, before, dy_chunk, *into in reversed(list(pieces)):
            *found, ddecay, dstate = chunk_backward(chunk, before, dy_chunk, dstate)
            # `decay` is a running sum of dt A: each summand counts for all tokens after it.
            ddecay = ddecay.flip(1).cumsum(1).flip(1)
            found[1] = found[1] + A * ddecay
            dA += (chunk.dt * ddecay).sum((0, 1))
            for target, gradient in zip(into, found, strict=True):
                target.copy_(gradient)
        dx, ddt, dB, dC = gradients
        return dx, ddt, dA, dB, dC, dstate.permute(0, 2, 3, 1), None


def chunk_backward(chunk: Chunk, state: Tensor, dy: Tensor, dafter: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, dt (but for its part in the decay), B, C, decay, and the state before the chunk.

    Args:
        chunk: the chunk.
        state: (b, n, h, p) before it.
        dy: (b, q, h, p) gradient of its outputs.
        dafter: (b, n, h, p) gradient of the state after it.
    """
    dtype, heads, inputs, scores = chunk.x.dtype, chunk.x.shape[2:], chunk.inputs, chunk.scores
    from_start, to_end = chunk.from_start, chunk.to_end
    dy_heads, inputs_heads = dy.transpose(1, 2), inputs.transpose(1, 2)  # (b, h, q, p)

    # Inside the chunk: y_t += sum over s of scores_ts decay_ts inputs_s.
    between = chunk.decay_between()
    dinside = ((between * scores).to(dtype).transpose(-1, -2) @ dy_heads).transpose(1, 2)
    dmixing = between.mul_(dy_heads @ inputs_heads.transpose(-1, -2))  # of the scores of each head
    dscores = dmixing.sum(1).tril_().to(dtype)
    dmixing.mul_(scores)
    ddecay = (dmixing.sum(-1) - dmixing.sum(-2)).transpose(1, 2)  # (b, q, h)

    # From the state before: y_t += from_start_t C_t state.
    flat, dflat = state.flatten(2).to(dtype), dafter.flatten(2).to(dtype)  # (b, n, h p)
    dcarried = scaled(dy, from_start)
    ddecay = ddecay + (dcarried * (chunk.C @ flat).unflatten(2, heads)).sum(-1, dtype=torch.float32)

    # To the state after: sum over s of to_end_s B_s inputs_s, and what is left of the state before.
    ended = scaled(inputs, to_end)
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
    return scaled(dinputs, chunk.dt), (chunk.x * dinputs).sum(-1, dtype=torch.float32), dB, dC, ddecay, dstate


def split(t: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    """Along the tokens, into the fewest parts of at most `chunk_size`, as equal as can be."""
    count = -(-t.shape[1] // chunk_size)
    return t.tensor_split(count, dim=1)


def chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> list[Chunk]:
    parts = zip(*(split(t, chunk_size) for t in (x, dt, B, C)), strict=True)
    return [Chunk(x, dt, B, C, (dt * A).cumsum(1)) for x, dt, B, C in parts]


def exponential(decay: Tensor) -> Tensor:
    """What is left after a decay whose logarithm is given, any shape, but no less than e^MIN_LOG_DECAY."""
    return decay.clamp(min=MIN_LOG_DECAY).exp_()


def scaled(t: Tensor, factor: Tensor) -> Tensor:
    """(b, q, h, p) times (b, q, h), in the dtype of the first."""
    return t * factor[..., None].to(t.dtype)
