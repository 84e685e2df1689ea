"""Corrupted token pyramids and the tokens that repair them (Infinity, arXiv 2412.04431, bitwise self-correction).

Infinity flips bits of each scale's code and quantizes the residual of the image's features again, so later scales learn
to repair the error. Here tokens are code indices, and no features are needed.

Shapes: b images, l tokens of all scales, n tokens of a scale, v vocabulary, c code dim, m neighbors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mvar.tokenizer.quantizer import ResidualQuantizer


class Corrupted(NamedTuple):
    """A corrupted pyramid."""

    inputs: Tensor  # (b, l - first, c) teacher-forcing input of the replaced tokens
    targets: Tensor  # (b, l) int64 best token at each scale, given the replaced tokens of the scales before it


@torch.no_grad()
def corrupt_pyramid(
    quantizer: ResidualQuantizer, tokens: Tensor, replace: Callable[[Tensor, slice], Tensor]
) -> Corrupted:
    """Replaces tokens of all scales but the last; targets come from `ResidualQuantizer.repairing_tokens`.

    Without replacements, inputs and targets equal those of teacher forcing.

    Args:
        quantizer: codebook and phi.
        tokens: (b, l) int64 true tokens.
        replace: (targets (b, n) of a scale, its positions) -> tokens (b, n) to continue from.
    """
    schedule, f_hat, true_f_hat = quantizer.schedule, quantizer.empty(len(tokens)), quantizer.empty(len(tokens))
    inputs, targets = [quantizer.codebook.weight.new_zeros(len(tokens), 0, quantizer.codebook.embedding_dim)], []
    for k, true in enumerate(tokens.split(schedule.lengths, dim=1)):
        targets.append(quantizer.repairing_tokens(true, true_f_hat, f_hat, k))  # (b, n)
        if k + 1 < schedule.num_scales:
            span = slice(schedule.offsets[k], schedule.offsets[k] + schedule.lengths[k])
            f_hat = quantizer.accumulate(f_hat, quantizer.codebook(replace(targets[k], span)), k)
            true_f_hat = quantizer.accumulate(true_f_hat, quantizer.codebook(true), k)
            inputs.append(quantizer.downsample(f_hat, k + 1))
    return Corrupted(torch.cat(inputs, dim=1), torch.cat(targets, dim=1))


class Neighbors(NamedTuple):
    """The nearest other codes of each code, nearest first."""

    codes: Tensor  # (v, m) int64
    cumulative: Tensor  # (v, m) float32 cumulative probabilities

    @classmethod
    def find(cls, codebook: Tensor, count: int, temperature: float | None = None) -> Neighbors:
        """Finds the `count` nearest codes in L2 of each code.

        Args:
            codebook: (v, c) codes.
            count: m < v, the number of neighbors.
            temperature: makes probabilities proportional to exp(-d / temperature), where d is the squared distance
                relative to that of the nearest different code, averaged over all codes; None makes them equal.
        """
        points = codebook.double()
        # Without matrix products, the distance between equal codes is exactly 0.
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest, codes = distances.fill_diagonal_(torch.inf).topk(count, dim=1, largest=False)
        logits = torch.zeros_like(nearest)
        if temperature is not None:
            unit = distances.where(distances > 0, torch.inf).amin(dim=1).mean()  # infinite if all codes are equal
            logits = -nearest / (temperature * unit)
        return cls(codes, logits.softmax(dim=1).cumsum(dim=1).float())

    def draw(self, tokens: Tensor, uniforms: Tensor) -> Tensor:
        """Draws a neighbor of each token (b, n), given uniform numbers (b, n) in [0, 1)."""
        choice = torch.searchsorted(self.cumulative[tokens], uniforms[..., None].contiguous(), right=True)
        return self.codes[tokens].gather(-1, choice.clamp(max=self.codes.shape[1] - 1))[..., 0]
