"""Vendi score of an image set: its effective number of distinct images (arXiv 2210.02410).

    exp(-sum_i l_i log l_i),    l_i the eigenvalues of K / n, K the cosine similarities of the n images' features

K / n has the same nonzero eigenvalues as the mean outer product of normalized features, so a running sum suffices. The
score lies between 1 (all features have the same direction) and the number of images or features, whichever is smaller.
It needs no real images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_mvar.metrics.frechet import FeatureSums


class VendiScore(FeatureSums):
    """Accumulates features (b, f), normalized, into the score."""

    def update(self, features: Tensor) -> None:
        super().update(normalize(features.double(), dim=1))

    def compute(self) -> float:
        """Returns the score; 1 if all features are 0 and have no direction."""
        total = self.outer.trace()
        if total == 0:
            return 1.0
        eigenvalues = torch.linalg.eigvalsh(self.outer / total).clamp(min=0)
        return float(torch.special.entr(eigenvalues).sum().exp())
