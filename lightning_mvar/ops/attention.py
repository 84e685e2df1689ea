"""Attention over a packed sequence of scales, without a mask over the whole sequence.

Shapes: b batch, h heads, l tokens, p head dim. `lengths` gives the number of tokens of each scale in the pack, so the
same functions serve a whole image (all scales) and one sampling step (a single scale). One dense call per scale over
split views is about three times as fast on a CPU as a single call with a mask; a GPU in half precision has a kernel
that takes all scales of all images at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.ops.kernels import FOUND
from lightning_mvar.ops.neighbours import neighbourhood
from lightning_mvar.scales import Shape


def attend_within_scales(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """Bidirectional attention inside each scale; no token sees another scale (M-VAR, arXiv 2411.10433, section 3.2).

    Args:
        q, k, v: (b, h, l, p) with l = sum(lengths).
        lengths: tokens of each scale.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    kernel = FOUND.get("packed attention")
    if kernel is not None and len(lengths) > 1 and fits_kernel(q):
        return attend_packed(kernel, q, k, v, lengths, softmax_scale)
    splits = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return joined([F.scaled_dot_product_attention(*scale, scale=softmax_scale) for scale in splits])


def fits_kernel(q: Tensor) -> bool:
    """Whether torch's attention for packed sequences takes such queries (b, h, l, p)."""
    p = q.shape[-1]
    return q.is_cuda and q.dtype.itemsize == 2 and p % 8 == 0 and p <= 256


def attend_packed(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float
) -> Tensor:
    """`attend_within_scales` as one call of a kernel for sequences of different lengths: the scales of all images."""
    b, _, _, p = q.shape
    q = q * (softmax_scale * math.sqrt(p))  # the kernel's own factor is 1 / sqrt(p)
    packed = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (b l, h, p)
    begins, longest = sequence_begins(lengths, b, q.device), max(lengths)
    y: Tensor = kernel(*packed, begins, begins, longest, longest)
    return y.unflatten(0, (b, -1)).transpose(1, 2)


@cache
def sequence_begins(lengths: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """(batch * scales + 1,) int32: where each scale begins among the packed tokens, and where the last one ends."""
    with torch.inference_mode(False):  # a validation may be the first to ask, and training goes on with the answer
        images = torch.arange(batch + 1, dtype=torch.int32, device=device) * sum(lengths)
        begins = [images[:-1] + begin for begin in accumulate(lengths[:-1], initial=0)]
        return torch.cat([torch.stack(begins, dim=1).flatten(), images[-1:]])


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], window: int, softmax_scale: float
) -> Tensor:
    """Attention to the tokens in a window x window square around each, inside its scale: linear in the tokens.

    Args:
        q, k, v: (b, h, l, p), l the tokens of all scales, each a map in raster order.
        shapes: height and width of each scale.
        window: side of the square, odd.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    positions, inside = neighbourhood(shapes, window, q.device)
    keys, values = (t[:, :, positions] for t in (k, v))  # (b, h, l, w, p)
    mask = inside[:, None]  # (l, 1, w)
    return F.scaled_dot_product_attention(q[..., None, :], keys, values, mask, scale=softmax_scale)[..., 0, :]


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
    if max(lengths) == 1 and not cached:  # token by token, in one call
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
    ends = [cached + end for end in accumulate(lengths)]
    return attend_ranges(q, k, v, lengths, [0] * len(ends), ends, softmax_scale)


def attend_previous(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """Attention of each scale to itself and the one before it.

    Args:
        q: (b, h, l, p) queries of the new scales, l = sum(lengths).
        k, v: (b, h, cached + l, p): the keys and values of the scale before the new ones, if any, then of those.
        lengths: tokens of each new scale.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    cached = k.shape[2] - q.shape[2]
    ends = [cached + end for end in accumulate(lengths)]
    begins = [0, cached, *ends][: len(ends)]
    return attend_ranges(q, k, v, lengths, begins, ends, softmax_scale)


def attend_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    begins: list[int],
    ends: list[int],
    softmax_scale: float,
) -> Tensor:
    """Attention of each part of `lengths` queries to the keys from its begin to its end."""
    outputs = [
        F.scaled_dot_product_attention(queries, k[:, :, begin:end], v[:, :, begin:end], scale=softmax_scale)
        for queries, begin, end in zip(q.split(lengths, 2), begins, ends, strict=True)
    ]
    return joined(outputs)


def joined(outputs: list[Tensor]) -> Tensor:
    """Along the tokens; of a single scale, as in sampling, without a copy."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
