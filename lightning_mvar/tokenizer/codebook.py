"""What keeps a codebook in use: codes as running means of what chose them, and entropy terms over soft assignments.

The known failure of a multi-scale tokenizer is that the coarse scales collapse onto a few codes, and the finest carries
the picture alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_mvar.errors import InputError
from lightning_mvar.tokenizer.quantizer import PyramidStep, ResidualQuantizer


@dataclass(frozen=True)
class CodebookConfig:
    """How the codes are learned.

    Args:
        learning: `gradient` of the quantization loss, or `ema`: each code is a running mean of the queries that chose
            it (VQ-VAE, arXiv 1711.00937, appendix A.1). The phi learn by gradient in either case.
        decay: of the running means, in each step.
        smoothing: that many virtual queries choose every code in every step (Laplace), so that none divides by zero.
        entropy_weight: of the entropy terms, see `entropy_loss`; 0 for none.
        temperature: of their soft assignments, in units of the scale's mean squared distance between queries and codes.
        entropy_queries: queries of each scale and rank that the entropies are taken of, drawn anew in every step where
            there are more: the memory is that of entropy_queries x vocab_size numbers a scale.
        scale_dropout: probability that a training image is decoded from its first scales only, their number drawn
            evenly, so that the coarse ones must carry the picture (as SoundStream does with quantizers, arXiv
            2107.03312).
    """

    learning: Literal["gradient", "ema"] = "gradient"
    decay: float = 0.99
    smoothing: float = 1e-5
    entropy_weight: float = 0.0
    temperature: float = 0.1
    entropy_queries: int = 1024
    scale_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"codebook.decay must be in [0, 1), got {self.decay}")
        if not 0 <= self.scale_dropout <= 1:
            raise InputError(f"codebook.scale_dropout must be in [0, 1], got {self.scale_dropout}")
        for name in ("smoothing", "temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"codebook.{name} must be positive, got {getattr(self, name)}")
        if self.entropy_weight < 0 or self.entropy_queries < 1:
            raise InputError(
                f"codebook.entropy_weight {self.entropy_weight} or codebook.entropy_queries {self.entropy_queries} is "
                f"too small"
            )


class CodebookAverage(nn.Module):
    """Running means of how many queries choose each code, and of their sum.

    Args:
        codes: (v, c) the codes to begin with, each as if one query had chosen it in every step before.
        config: decay and smoothing.
    """

    def __init__(self, codes: Tensor, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes: Tensor
        self.sums: Tensor
        self.register_buffer("sizes", torch.ones(len(codes)))
        self.register_buffer("sums", codes.detach().float().clone())

    @torch.no_grad()
    def update(self, chosen: Tensor, finite: Tensor) -> Tensor:
        """The new codes (v, c).

        Args:
            chosen: (v, c + 1) of this step and all ranks: the sums of the queries that chose each code, their number.
            finite: () bool, whether the step counts; else nothing changes.
        """
        kept = self.config.decay
        self.sizes.copy_(torch.where(finite, kept * self.sizes + (1 - kept) * chosen[:, -1], self.sizes))
        self.sums.copy_(torch.where(finite, kept * self.sums + (1 - kept) * chosen[:, :-1], self.sums))
        total, small = self.sizes.sum(), self.config.smoothing
        sizes = (self.sizes + small) / (total + len(self.sizes) * small) * total
        return self.sums / sizes[:, None]

    @torch.no_grad()
    def restart(self, rows: Tensor, codes: Tensor) -> None:
        """Begin anew with `codes` (n, c) in some `rows` (n,)."""
        self.sizes[rows], self.sums[rows] = 1.0, codes.to(self.sums)


@torch.no_grad()
def sums_of_choices(steps: list[PyramidStep], vocab_size: int) -> Tensor:
    """(v, c + 1) float32: over all scales, the sum of the queries that chose each code, and their number."""
    queries = torch.cat([step.queries.flatten(0, 1) for step in steps]).float()
    tokens = torch.cat([step.tokens.flatten() for step in steps])
    counted = torch.cat([queries, queries.new_ones(len(queries), 1)], dim=1)
    return counted.new_zeros(vocab_size, counted.shape[1]).index_add_(0, tokens, counted)


def entropy_loss(
    quantizer: ResidualQuantizer,
    features: Tensor,
    steps: list[PyramidStep],
    codes: Tensor,
    config: CodebookConfig,
    over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """() mean over scales of [entropy of a query's assignment - entropy of the mean assignment] / log v.

    Low where each query is sure of its code while all codes are chosen alike at every scale (MAGVIT-v2, arXiv
    2310.05737, whose codes are fixed; MaskGIT's published code has it for learned ones). An assignment is the softmax
    over - d^2 / (temperature mean d^2), d the distance of query and code and the mean that of the scale: the residuals,
    and with them all distances, shrink from scale to scale, and what "sure" means must not.

    Args:
        quantizer: that made `steps`.
        features: (b, c, s, s) with their gradient.
        steps: of each scale.
        codes: (v, c) with their gradient, if they have one.
        config: temperature, and how many queries to look at.
        over_ranks: the mean over all ranks of a tensor.
    """
    f_hats = [torch.zeros_like(features), *(step.f_hat.detach() for step in steps[:-1])]
    terms = []
    with torch.autocast(features.device.type, enabled=False):
        for scale, f_hat in enumerate(f_hats):
            queries = quantizer.downsample(features.float() - f_hat.float(), scale).flatten(0, 1)  # (b n, c)
            if len(queries) > config.entropy_queries:
                queries = queries[torch.randint(len(queries), (config.entropy_queries,), device=queries.device)]
            logs = soft_assignment(queries, codes.float(), config.temperature, over_ranks)
            mean = logs.exp().mean(dim=0)
            everywhere = mean + (over_ranks(mean.detach()) - mean.detach())  # its gradient is that of this rank's part
            sureness = -(logs.exp() * logs).sum(dim=1).mean()
            variety = -(everywhere * everywhere.clamp(min=1e-12).log()).sum()
            terms.append((sureness - variety) / math.log(len(codes)))
    return torch.stack(terms).mean()


def soft_assignment(
    queries: Tensor, codes: Tensor, temperature: float, over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """Queries (n, c), codes (v, c) -> log probabilities (n, v)."""
    squared = queries.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * queries @ codes.T
    mean = over_ranks(squared.detach().mean())
    return (-squared / (temperature * mean)).log_softmax(dim=1)
