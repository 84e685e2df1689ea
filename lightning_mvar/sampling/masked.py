"""Masked steps: a scale drawn in several steps, each of which reads the tokens kept so far (MaskGIT, arXiv 2202.04200).

Each step predicts the scale from the same state of the network and draws all hidden tokens. It keeps some of them,
which the next step reads as revealed, and forgets the others; the last step keeps all. With one step, the tokens of a
scale are independent of each other given the coarser scales.

| MaskGIT, section 3.2 and code | here                                                                           |
|-------------------------------|--------------------------------------------------------------------------------|
| mask scheduling function      | the cosine in `Kept.more`, which keeps at least one token per step             |
| confidence                    | `confidence`: log-probability of the drawn token, before top-k and top-p       |
| choice temperature            | `order_temperature`: factor of Gumbel noise on the confidence, falling to 0    |

Shapes: b images, n tokens of the scale, v vocabulary, c code dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import Revealed
from lightning_mvar.sampling.settings import SamplingSettings


class Kept(NamedTuple):
    """Tokens of a scale that are kept while its others are drawn."""

    tokens: Tensor  # (b, n) int64
    codes: Tensor  # (b, n, c)
    mask: Tensor  # (b, n) bool: True for kept tokens
    drawn: Tensor  # (b, 1) int64: how many tokens are drawn in all, those that are not known beforehand

    @classmethod
    def known(cls, tokens: Tensor, codes: Tensor, mask: Tensor) -> Kept:
        """Starts from the known tokens."""
        return cls(tokens, codes, mask, (~mask).sum(dim=1, keepdim=True))

    def fill(self, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Puts kept tokens and codes in the place of drawn ones."""
        return torch.where(self.mask, self.tokens, tokens), torch.where(self.mask[..., None], self.codes, codes)

    def more(self, tokens: Tensor, codes: Tensor, priority: Tensor, progress: float) -> Kept:
        """Keeps some more tokens after a step.

        Args:
            tokens: (b, n) drawn in the step, or kept before.
            codes: (b, n, c) of the tokens.
            priority: (b, n) finite; tokens of the highest are kept.
            progress: share of the steps that are done, in (0, 1); the cosine of it stays hidden.
        """
        left = torch.floor(self.drawn * math.cos(math.pi / 2 * progress))  # (b, 1)
        hidden = torch.minimum(left, (~self.mask).sum(dim=1, keepdim=True) - 1).clamp(min=0)  # (b, 1)
        order = priority.masked_fill(self.mask, torch.inf).argsort(dim=1, descending=True, stable=True)
        return Kept(tokens, codes, order.argsort(dim=1) < tokens.shape[1] - hidden, self.drawn)


def revealed_to(network: MVARConfig, revealed: Revealed | None, rows: int) -> Revealed | None:
    """Returns the kept tokens, codes and mask each repeated to `rows` rows; None if the network reads none."""
    if revealed is None or not network.reveal:
        return None
    codes, mask = revealed
    return Revealed(codes.repeat(rows // len(codes), 1, 1), mask.repeat(rows // len(mask), 1))


def keep_more(
    kept: Kept | None,
    tokens: Tensor,
    codes: Tensor,
    logits: Tensor,
    uniforms: Tensor,
    progress: float,
    settings: SamplingSettings,
) -> Kept:
    """Keeps some more tokens after a step that is not the last, in the order of the settings.

    Args:
        kept: what the step read; None for nothing.
        tokens: (b, n) drawn in the step, or kept before.
        codes: (b, n, c) of the tokens.
        logits: (b, n, v) from which they were drawn.
        uniforms: (b, n) in [0, 1) random numbers of the order.
        progress: share of the steps that are done, in (0, 1).
        settings: `order` and `order_temperature`.
    """
    if kept is None:
        kept = Kept.known(tokens, codes, torch.zeros_like(tokens, dtype=torch.bool))
    if settings.order == "random":
        return kept.more(tokens, codes, uniforms, progress)
    noise = settings.order_temperature * (1 - progress)
    return kept.more(tokens, codes, confidence(logits, tokens, uniforms, noise), progress)


def confidence(logits: Tensor, tokens: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Returns log-probabilities (b, n) of drawn tokens (b, n) plus Gumbel noise.

    Args:
        logits: (b, n, v) from which they were drawn.
        tokens: (b, n) int64.
        uniforms: (b, n) in [0, 1), of the noise.
        temperature: factor of the noise.
    """
    noise = -torch.log(-torch.log(uniforms.clamp(1e-9, 1 - 1e-7)))
    return logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0] + temperature * noise
