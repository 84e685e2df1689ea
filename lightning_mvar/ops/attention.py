"""Attention over a packed sequence of scales, without a mask over the whole sequence.

Shapes: b batch, h heads, l tokens, p head dim. `lengths` gives the number of tokens of each scale in the pack, so the
same functions serve a whole image (all scales) and one sampling step (a single scale). One dense call per scale over
split views is about three times as fast on a CPU as a single call with a mask.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_within_scales(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """Bidirectional attention inside each scale; no token sees another scale (M-VAR, arXiv 2411.10433, section 3.2).

    Args:
        q, k, v: (b, h, l, p) with l = sum(lengths).
        lengths: tokens of each scale.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    splits = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*scale, scale=softmax_scale) for scale in splits], dim=2)


def attend_block_causal(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """Attention of each scale to itself and to all that came before (VAR, arXiv 2404.02905, section 3.2).

    Args:
        q: (b, h, l, p) queries of the new scales, l = sum(lengths).
        k, v: (b, h, cached + l, p): the keys and values of earlier calls, then those of the new scales.
        lengths: tokens of each new scale.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    cached = k.shape[2] - q.shape[2]
    ends = (cached + end for end in accumulate(lengths))
    outputs = [
        F.scaled_dot_product_attention(queries, k[:, :, :end], v[:, :, :end], scale=softmax_scale)
        for queries, end in zip(q.split(lengths, 2), ends, strict=True)
    ]
    return torch.cat(outputs, dim=2)
