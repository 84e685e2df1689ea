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
| L         | within-chunk decay matrix of `ssd_chunked`                            |

Shapes: b batch, l tokens, h heads, p head dim, n SSM state; in the chunked form c chunks of q tokens.

`ssd` is what networks call: the Triton kernels of mamba-ssm on CUDA where that package is installed, `ssd_chunked`
everywhere else. `ssd_recurrent` is the definition written out, and what the others are tested against. All of them
take the state before the first token and return the state after the last, so a long sequence can be computed piece by
piece. The state is float32 whatever the inputs are: it accumulates over the whole sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

CHUNK_SIZE = 64


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
    kernel = mamba_ssm_kernel() if x.is_cuda else None
    if kernel is None:
        return ssd_chunked(x, dt, A, B, C, state)
    y, final = kernel(
        x, dt, A, B[:, :, None], C[:, :, None], CHUNK_SIZE, initial_states=state, return_final_states=True
    )
    return y, final.float()


@cache
def mamba_ssm_kernel() -> Callable[..., Any] | None:
    """The chunk-scan kernel of the optional mamba-ssm package, or None where it is not installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        log.info("scan backend: torch (mamba-ssm is not usable here: %s)", error)
        return None
    log.info("scan backend: mamba-ssm")
    return mamba_chunk_scan_combined


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
    the number of states kept between chunks. Products run in the dtype of `x`, decays and states in float32.
    """
    b, l, h, p = x.shape
    chunks = -(-l // chunk_size)
    q = -(-l // chunks)  # chunks of equal length, so that at most one token a chunk is padding
    padding = chunks * q - l  # padded tokens have dt = 0: they neither decay the state nor add to it
    inputs = (x.float() * dt[..., None]).to(x.dtype)
    inputs, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding)) for t in (inputs, B, C))
    log_decay = F.pad((dt * A).float(), (0, 0, 0, padding))

    inputs = inputs.unflatten(1, (-1, q)).transpose(2, 3)  # (b, c, h, q, p)
    B, C = B.unflatten(1, (-1, q)), C.unflatten(1, (-1, q))  # (b, c, q, n)
    log_decay = log_decay.unflatten(1, (-1, q)).transpose(2, 3).cumsum(-1)  # (b, c, h, q), from the chunk's start

    # 1. Inside each chunk: y_t = sum over s <= t of (C_t . B_s) exp(decay from s to t) x_s.
    future = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
    L = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(future, -torch.inf).exp()  # (b, c, h, q, q)
    scores = (C @ B.transpose(-1, -2))[:, :, None]  # (b, c, 1, q, q)
    y = (scores * L).to(x.dtype) @ inputs  # (b, c, h, q, p)

    # 2. What each chunk alone adds to the state by its end.
    to_end = (log_decay[..., -1:] - log_decay).exp()[..., None]  # (b, c, h, q, 1)
    added = (inputs * to_end.to(x.dtype)).transpose(-1, -2) @ B[:, :, None]  # (b, c, h, p, n)

    # 3. Carry the state from chunk to chunk.
    chunk_decay = log_decay[..., -1].exp()[..., None, None]  # (b, c, h, 1, 1)
    state = x.new_zeros(b, h, p, B.shape[-1], dtype=torch.float32) if state is None else state
    entering = []
    for chunk in range(added.shape[1]):
        entering.append(state)
        state = chunk_decay[:, chunk] * state + added[:, chunk].float()

    # 4. What the state at the chunk's start contributes to each of its tokens.
    carried = C[:, :, None] @ torch.stack(entering, dim=1).to(x.dtype).transpose(-1, -2)  # (b, c, h, q, p)
    y = y + carried * log_decay.exp()[..., None].to(x.dtype)
    return y.transpose(2, 3).flatten(1, 2)[:, :l], state
