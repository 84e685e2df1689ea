"""Attention over a packed sequence of scales, without a mask over the whole sequence.

Shapes: b batch, h heads, l tokens, p head dim. `lengths` gives the number of tokens of each scale in the pack, so the
same functions serve a whole image (all scales) and one sampling step (a single scale). One dense call per scale over
split views is about three times as fast on a CPU as a single call with a mask; a GPU in half precision has a kernel
that takes all scales of all images at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


def attend_within_scales(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """Bidirectional attention inside each scale; no token sees another scale (M-VAR, arXiv 2411.10433, section 3.2).

    Args:
        q, k, v: (b, h, l, p) with l = sum(lengths).
        lengths: tokens of each scale.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    half_on_gpu = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if half_on_gpu and len(lengths) > 1 and (kernel := varlen_kernel()) is not None:
        return attend_packed(kernel, q, k, v, lengths, softmax_scale)
    splits = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*scale, scale=softmax_scale) for scale in splits], dim=2)


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """torch's attention for packed sequences of different lengths (CUDA, half precision), or None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        log.info("attention inside scales: one call for each (%s)", error)
        return None
    log.info("attention inside scales: one call for all (varlen_attn)")
    return varlen_attn


def attend_packed(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float
) -> Tensor:
    """`attend_within_scales` as one call of a kernel for sequences of different lengths: the scales of all images."""
    b, _, _, p = q.shape
    q = q * (softmax_scale * math.sqrt(p))  # the kernel's own factor is 1 / sqrt(p)
    packed = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (b l, h, p)
    begins, longest = sequence_begins(lengths * b, q.device), max(lengths)
    y: Tensor = kernel(*packed, begins, begins, longest, longest)
    return y.unflatten(0, (b, -1)).transpose(1, 2)


@cache
def sequence_begins(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(sequences + 1,) int32: where each begins among the packed tokens, and where the last one ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


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
