"""Scoring and drawing of tokens without the logits of the complete batch in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # 64 MiB of float32


def score_in_parts(
    logits: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    cond: Tensor,
    tokens: Tensor,
    vocab_size: int,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Scores a few images at a time; the backward pass recomputes the logits, which take the most memory.

    Args:
        logits: the network's head, (b, l, d) and (b, d) -> (b, l, v).
        x: (b, l, d) output of the last block.
        cond: (b, d) class embeddings.
        tokens: (b, l) int64 to predict.
        vocab_size: v.
        label_smoothing: share of each target that is spread evenly over the vocabulary.

    Returns:
        Cross entropy in nats, and 1 if the most likely token is the right one, else 0: (b, l) float32 each.
    """

    def score(x: Tensor, cond: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        predicted = logits(x, cond)
        losses = F.cross_entropy(
            predicted.flatten(0, 1), tokens.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        return losses.view_as(tokens), (predicted.detach().argmax(dim=-1) == tokens).float()

    parts = zip(*(tensor.split(images_at_once(x.shape[1], vocab_size)) for tensor in (x, cond, tokens)), strict=True)
    scores = [checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    losses, correct = zip(*scores, strict=True)
    return torch.cat(losses), torch.cat(correct)


def draw_in_parts(
    logits: Callable[[Tensor, Tensor], Tensor], x: Tensor, cond: Tensor, uniforms: Tensor, vocab_size: int
) -> Tensor:
    """Draws tokens (b, l) int64 by inverting the CDF at `uniforms` (b, l) in [0, 1), a few images at a time."""
    drawn = []
    for x_part, cond_part, part in zip(
        *(tensor.split(images_at_once(x.shape[1], vocab_size)) for tensor in (x, cond, uniforms)), strict=True
    ):
        cumulative = logits(x_part, cond_part).softmax(dim=-1).cumsum(dim=-1)  # (b, l, v)
        drawn.append(torch.searchsorted(cumulative, part[..., None] * cumulative[..., -1:], right=True)[..., 0])
    return torch.cat(drawn).clamp(max=vocab_size - 1)  # NaN logits must not raise an index error


def images_at_once(length: int, vocab_size: int) -> int:
    """Returns how many images of `length` tokens are scored at a time."""
    return max(1, LOGITS_AT_ONCE // (length * vocab_size))
