"""Remedies for codebook collapse: codes learned as running means (EMA), and entropy terms over soft assignments.

In a multi-scale tokenizer, the coarse scales tend to collapse onto a few codes, leaving the image to the finest scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_mvar.devices import without_autocast
from lightning_mvar.errors import require_in
from lightning_mvar.tokenizer.quantizer import PyramidStep, ResidualQuantizer, squared_distances


@dataclass(frozen=True)
class CodebookConfig:
    """Codebook learning and regularization.

    Args:
        learning: `gradient` of the quantization loss, or `ema`: each code is a running mean of the queries assigned to
            it (VQ-VAE, arXiv 1711.00937, appendix A.1). The phi convolutions learn by gradient in either case.
        decay: decay of the running means per step.
        smoothing: Laplace smoothing: pseudo-count added to each code, so that unused codes do not divide by zero.
        entropy_weight: weight of the entropy terms, see `entropy_loss`; 0 disables them.
        temperature: softmax temperature of the soft assignments, relative to the scale's mean squared distance between
            queries and codes.
        entropy_queries: maximum number of queries per scale and rank in the entropy terms; a random subset is drawn in
            each step if there are more. They need memory for entropy_queries x vocab_size numbers per scale.
        scale_dropout: probability that a training image is decoded from its first scales only; their number is drawn
            uniformly. Forces the coarse scales to encode the image (quantizer dropout of SoundStream, arXiv
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
        require_in("[0, 1)", "codebook.", decay=self.decay)
        require_in("[0, 1]", "codebook.", scale_dropout=self.scale_dropout)
        require_in("(0, inf)", "codebook.", smoothing=self.smoothing, temperature=self.temperature)
        require_in("[0, inf)", "codebook.", entropy_weight=self.entropy_weight)
        require_in("[1, inf)", "codebook.", entropy_queries=self.entropy_queries)


class CodebookAverage(nn.Module):
    """Running means of the number and the sum of the queries assigned to each code.

    Args:
        codes: (v, c) initial codes; each starts with a running count of 1.
        config: provides decay and smoothing.
    """

    def __init__(self, codes: Tensor, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes: Tensor
        self.sums: Tensor
        self.register_buffer("sizes", torch.ones(len(codes)))
        self.register_buffer("sums", codes.detach().float().clone())

    @torch.no_grad()
    def update(self, assigned: Tensor, finite: Tensor) -> Tensor:
        """Updates the running means and returns the new codes (v, c).

        Args:
            assigned: (v, c + 1) sum and number of the queries assigned to each code in this step, over all ranks.
            finite: () bool; if False, the step is skipped and nothing changes.
        """
        decay = self.config.decay
        self.sizes.copy_(torch.where(finite, decay * self.sizes + (1 - decay) * assigned[:, -1], self.sizes))
        self.sums.copy_(torch.where(finite, decay * self.sums + (1 - decay) * assigned[:, :-1], self.sums))
        total, smoothing = self.sizes.sum(), self.config.smoothing
        sizes = (self.sizes + smoothing) / (total + len(self.sizes) * smoothing) * total
        return self.sums / sizes[:, None]

    @torch.no_grad()
    def restart(self, rows: Tensor, codes: Tensor) -> None:
        """Restarts the running means of the rows marked in `rows` (v,) bool from those of `codes` (v, c)."""
        self.sizes.masked_fill_(rows, 1.0)
        self.sums.copy_(torch.where(rows[:, None], codes, self.sums))


@torch.no_grad()
def assignment_sums(steps: list[PyramidStep], vocab_size: int) -> Tensor:
    """Returns (v, c + 1) float32: sum and number of the queries assigned to each code, over all scales."""
    queries = torch.cat([step.queries.flatten(0, 1) for step in steps]).float()
    tokens = torch.cat([step.tokens.flatten() for step in steps])
    rows = torch.cat([queries, queries.new_ones(len(queries), 1)], dim=1)
    return rows.new_zeros(vocab_size, rows.shape[1]).index_add_(0, tokens, rows)


@torch.no_grad()
def draw_residuals(steps: list[PyramidStep], count: int) -> Tensor:
    """Draws `count` random residuals (count, c) of a batch, cycling through the scales."""
    queries = [step.queries.flatten(0, 1) for step in steps]  # (b n, c) of each scale
    scales = len(queries)
    rows = torch.stack([torch.randint(len(queries[i % scales]), ()) for i in range(count)])
    rows = rows.to(queries[0].device, non_blocking=True)
    drawn = queries[0].new_empty(count, queries[0].shape[1])
    for scale, residuals in enumerate(queries):
        drawn[scale::scales] = residuals[rows[scale::scales]]
    return drawn


def entropy_loss(
    quantizer: ResidualQuantizer,
    features: Tensor,
    steps: list[PyramidStep],
    codes: Tensor,
    config: CodebookConfig,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns () the mean over scales of [mean query entropy - entropy of the mean assignment] / log v.

    It is low if each query is assigned confidently while each scale uses all codes equally (MAGVIT-v2, arXiv
    2310.05737, with fixed codes; MaskGIT's published code applies it to learned codes). An assignment is the softmax
    over -d^2 / (temperature * mean d^2), with d the distance from query to code and the mean over the scale. The
    temperature is relative because residuals, and thus all distances, shrink from scale to scale.

    Args:
        quantizer: quantizer that produced `steps`.
        features: (b, c, s, s) features, with gradient.
        steps: pyramid steps, one per scale.
        codes: (v, c) codes, with gradient if they are learned by gradient.
        config: provides temperature and number of queries.
        mean_over_ranks: averages a tensor over all ranks, without gradient; called twice.
    """
    f_hats = [torch.zeros_like(features), *(step.f_hat.detach() for step in steps[:-1])]
    with without_autocast(features):
        distances = []  # (n, v) squared, of each scale
        for scale, f_hat in enumerate(f_hats):
            queries = quantizer.downsample(features.float() - f_hat.float(), scale).flatten(0, 1)  # (b n, c)
            if len(queries) > config.entropy_queries:
                queries = queries[torch.randint(len(queries), (config.entropy_queries,), device=queries.device)]
            distances.append(squared_distances(queries, codes.float()))
        means = mean_over_ranks(torch.stack([squared.detach().mean() for squared in distances]))
        logs = [
            (-squared / (config.temperature * mean)).log_softmax(dim=1)
            for squared, mean in zip(distances, means, strict=True)
        ]
        query_entropy = -torch.stack([(log.exp() * log).sum(dim=1).mean() for log in logs])
        assignment = torch.stack([log.exp().mean(dim=0) for log in logs])  # (k, v) mean over this rank
        own = assignment.detach()
        assignment = assignment + (mean_over_ranks(own) - own)  # mean over all ranks, with this rank's gradient
        mean_entropy = -(assignment * assignment.clamp(min=1e-12).log()).sum(dim=1)
        return (query_entropy - mean_entropy).mean() / math.log(len(codes))
