"""Attention over a packed sequence of scales, without a mask over the full sequence.

Shapes: b batch, h heads, l tokens, p head dim. `lengths` gives the number of tokens of each packed scale, so the same
functions serve a complete image (all scales) and one sampling step (a single scale). On a CPU, one dense call per scale
over split views is about three times as fast as a single masked call; in half precision, a GPU has a kernel that takes
all scales of all images at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.ops.kernels import KERNELS
from lightning_mvar.ops.neighbors import neighborhood, window_mask
from lightning_mvar.scales import Shape, lengths_of


def attend_within_scales(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """Attends bidirectionally inside each scale, never across scales (M-VAR, arXiv 2411.10433, section 3.2).

    Args:
        q, k, v: (b, h, l, p) with l = sum(lengths).
        lengths: tokens of each scale.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    kernel = KERNELS.get("packed attention")
    if kernel is not None and len(lengths) > 1 and supports_packed_kernel(q):
        return attend_packed(kernel, q, k, v, lengths, lengths, softmax_scale)
    splits = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return concat_tokens([F.scaled_dot_product_attention(*scale, scale=softmax_scale) for scale in splits])


def supports_packed_kernel(q: Tensor) -> bool:
    """Returns whether torch's variable-length attention supports these queries (b, h, l, p)."""
    p = q.shape[-1]
    return q.is_cuda and q.dtype.itemsize == 2 and p % 8 == 0 and p <= 256


def attend_packed(
    kernel: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    softmax_scale: float,
) -> Tensor:
    """Attends in one call of the variable-length kernel: part i of q attends to part i of k and v.

    Args:
        kernel: `torch.nn.attention.varlen.varlen_attn`, or a function with its signature.
        q: (b, h, l, p) with l = sum(lengths).
        k, v: (b, h, m, p) with m = sum(key_lengths).
        lengths, key_lengths: tokens of each part.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    b = len(q)
    packed = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (b l, h, p)
    offsets = (sequence_offsets(parts, b, q.device) for parts in (lengths, key_lengths))
    y: Tensor = kernel(*packed, *offsets, max(lengths), max(key_lengths), scale=softmax_scale)
    return y.unflatten(0, (b, -1)).transpose(1, 2)


@cache
def sequence_offsets(lengths: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Returns cumulative sequence lengths, (batch * scales + 1,) int32: the start of each scale, then the total."""
    with torch.inference_mode(False):  # validation may fill the cache, and training reuses the tensor
        images = torch.arange(batch + 1, dtype=torch.int32, device=device) * sum(lengths)
        starts = [images[:-1] + start for start in accumulate(lengths[:-1], initial=0)]
        return torch.cat([torch.stack(starts, dim=1).flatten(), images[-1:]])


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], window: int, softmax_scale: float
) -> Tensor:
    """Attends to the window x window square around each token, inside its scale.

    On a CPU, keys are gathered, and the cost is linear in l. On a GPU, that would take 76 times the memory of q;
    attention inside each scale with a mask is cheaper there.

    Args:
        q, k, v: (b, h, l, p), the tokens of all scales, each scale in raster order.
        shapes: height and width of each scale.
        window: side of the square, odd.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    if q.is_cuda:
        return attend_masked(q, k, v, shapes, window, softmax_scale)
    positions, inside = neighborhood(shapes, window, q.device)
    keys, values = (t[:, :, positions] for t in (k, v))  # (b, h, l, w, p)
    mask = inside[:, None]  # (l, 1, w)
    return F.scaled_dot_product_attention(q[..., None, :], keys, values, mask, scale=softmax_scale)[..., 0, :]


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], window: int, softmax_scale: float
) -> Tensor:
    """Computes `attend_window` by one masked call per scale; same arguments and result."""
    lengths = lengths_of(shapes)
    masks = [window_mask(shape, window, q.device) for shape in shapes]
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), masks, strict=True)
    return concat_tokens([F.scaled_dot_product_attention(*part, scale=softmax_scale) for part in parts])


def attend_block_causal(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """Attends from each scale to itself and all earlier scales (VAR, arXiv 2404.02905, section 3.2).

    Args:
        q: (b, h, l, p) queries of the new scales, l = sum(lengths).
        k, v: (b, h, cached + l, p) cached keys and values, followed by those of the new scales.
        lengths: tokens of each new scale.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    cached = k.shape[2] - q.shape[2]
    if max(lengths) == 1 and not cached:  # one token per step: a single causal call suffices
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
    ends = [cached + end for end in accumulate(lengths)]
    return attend_ranges(q, k, v, lengths, [0] * len(ends), ends, softmax_scale)


def attend_previous(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """Attends from each scale to itself and the previous scale.

    Args:
        q: (b, h, l, p) queries of the new scales, l = sum(lengths).
        k, v: (b, h, cached + l, p) keys and values of the previous scale, if any, followed by those of the new scales.
        lengths: tokens of each new scale.
        softmax_scale: factor on the logits.

    Returns:
        (b, h, l, p).
    """
    cached = k.shape[2] - q.shape[2]
    ends = [cached + end for end in accumulate(lengths)]
    starts = [0, cached, *ends][: len(ends)]
    return attend_ranges(q, k, v, lengths, starts, ends, softmax_scale)


def attend_ranges(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], starts: list[int], ends: list[int], softmax_scale: float
) -> Tensor:
    """Splits the queries by `lengths`; part i attends to keys starts[i]:ends[i]."""
    kernel = KERNELS.get("packed attention")
    if kernel is not None and len(lengths) > 1 and supports_packed_kernel(q):
        ranges = list(zip(starts, ends, strict=True))
        key_lengths = tuple(end - start for start, end in ranges)
        return attend_packed(
            kernel, q, KeyRanges.apply(k, ranges), KeyRanges.apply(v, ranges), lengths, key_lengths, softmax_scale
        )
    parts = zip(q.split(lengths, 2), key_ranges(k, starts, ends), key_ranges(v, starts, ends), strict=True)
    return concat_tokens([F.scaled_dot_product_attention(*part, scale=softmax_scale) for part in parts])


def key_ranges(t: Tensor, starts: list[int], ends: list[int]) -> list[Tensor]:
    """Returns tokens starts[i]:ends[i] of t (b, h, l, p) for each i.

    In training, each range is concatenated from the pieces between the bounds: the gradient of a slice would be a
    zero-filled tensor of all tokens, one per scale.
    """
    if not (t.requires_grad and torch.is_grad_enabled()):
        return [t[:, :, start:end] for start, end in zip(starts, ends, strict=True)]
    bounds = sorted({0, *starts, *ends})
    pieces = t.split([after - before for before, after in pairwise(bounds)], dim=2)
    ranges = ((bounds.index(start), bounds.index(end)) for start, end in zip(starts, ends, strict=True))
    return [concat_tokens(list(pieces[first:last])) for first, last in ranges]


class KeyRanges(torch.autograd.Function):
    """Concatenates the token ranges start:end of t (b, h, l, p)."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
        ctx.length, ctx.ranges = t.shape[2], ranges
        return torch.cat([t[:, :, start:end].transpose(1, 2) for start, end in ranges], dim=1).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        b, h, _, p = gradient.shape
        total = gradient.new_zeros(b, ctx.length, h, p).transpose(1, 2)
        parts = gradient.split([end - start for start, end in ctx.ranges], dim=2)
        for (start, end), part in zip(ctx.ranges, parts, strict=True):
            total[:, :, start:end] += part
        return total, None


def concat_tokens(parts: list[Tensor]) -> Tensor:
    """Concatenates along the token axis; a single part, as in sampling, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
