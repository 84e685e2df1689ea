"""Linear attention with decay: one recurrence, two ways to compute it.

For each head, with decay a_t per key channel (Gated Linear Attention, arXiv 2312.06635, section 4; the decay of
RetNet, arXiv 2307.08621, and of RWKV-5, arXiv 2404.05892, is the same at every token):

    S_t = S_{t-1} diag(a_t) + v_t k_t^T          S: (p, n)
    y_t = S_t q_t                                y: (p,)

| paper      | here        | meaning                                        |
|------------|-------------|------------------------------------------------|
| Q, K, V    | q, k, v     | queries, keys, values                          |
| alpha_t    | `log_decay` | log of the decay of each key channel           |
| S_t        | state       | recurrent state                                |

Shapes: b batch, l tokens, h heads, n key channels, p value channels; q (as a length) tokens per chunk.

Like `ops.ssd`, both forms take the state before the first token and return the state after the last, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mvar.devices import without_autocast

CHUNK_SIZE = 16
MIN_LOG_DECAY = -5.0  # at most e^80 over a chunk, which fits float32; at this decay a token keeps < 1 % of the state


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence as matrix products over chunks of tokens: linear in l, any l, with autograd.

    Inside a chunk, the decay from token s to t is split into two factors: from the chunk's start to t, and the inverse
    of that to s. The second one grows, hence the short chunks and the bound on the decay (paper, section 4.3).

    Args:
        q: (b, l, h, n) queries, any floating dtype.
        k: (b, l, h, n) keys.
        v: (b, l, h, p) values.
        log_decay: float32, broadcastable to (b, l, h, n), in [MIN_LOG_DECAY, 0].
        state: (b, h, p, n) float32 state before the first token; None for zeros.

    Returns:
        y (b, l, h, p) in the dtype of `v`, and the state after the last token (b, h, p, n) in float32.
    """
    dtype = v.dtype
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))  # (b, h, l, ...)
    log_decay = log_decay.expand(*k.transpose(1, 2).shape).transpose(1, 2)
    if state is None:
        state = v.new_zeros(*v.shape[:2], v.shape[-1], k.shape[-1])
    outputs = []
    pieces = zip(*(t.split(CHUNK_SIZE, dim=2) for t in (q, k, v, log_decay)), strict=True)
    with without_autocast(v):
        for queries, keys, values, decay in pieces:
            decay = decay.cumsum(2)  # (b, h, q, n) from the chunk's start to each token
            end = decay[:, :, -1:]
            decayed_queries = queries * decay.exp()
            scores = (decayed_queries @ (keys * (-decay).exp()).transpose(2, 3)).tril()  # (b, h, q, q)
            outputs.append(scores @ values + decayed_queries @ state.transpose(2, 3))
            state = torch.addcmul(values.transpose(2, 3) @ (keys * (end - decay).exp()), state, end.exp())
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), state


def linear_attention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence token by token (slow reference). Arguments and results as in `linear_attention`."""
    b, l, h, n = k.shape
    decay = log_decay.expand(b, l, h, n).exp()
    state = v.new_zeros(b, h, v.shape[-1], n, dtype=torch.float32) if state is None else state
    outputs = []
    for t in range(l):
        state = decay[:, t, :, None] * state + torch.einsum("bhp,bhn->bhpn", v[:, t].float(), k[:, t].float())
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, q[:, t].float()))
    return torch.stack(outputs, dim=1).to(v.dtype), state
