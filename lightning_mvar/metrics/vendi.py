"""Vendi score of an image set: its effective number of different images (arXiv 2210.02410).

    exp(-sum_i l_i log l_i),    l_i the eigenvalues of K / n, K the cosine similarities of the n images' features

K / n has the same nonzero eigenvalues as the mean outer product of normalised features, so a running sum suffices. The
score lies between 1 (all features point the same way) and the smaller of images and features. It needs no real images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric


class VendiScore(Metric):
    """Accumulates features (b, f) into the score, as a float64 sum that is added over all ranks.

    `options` are those of torchmetrics: `sync_on_compute=False` for the score of this rank.
    """

    full_state_update = False

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(**options)
        self.outer: Tensor
        self.add_state("outer", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, features: Tensor) -> None:
        features = normalize(features.double(), dim=1)
        self.outer += features.T @ features

    def compute(self) -> float:
        """Returns the score; 1 if all features are 0, which no direction tells apart."""
        total = self.outer.trace()
        if total == 0:
            return 1.0
        eigenvalues = torch.linalg.eigvalsh(self.outer / total).clamp(min=0)
        return float(torch.special.entr(eigenvalues).sum().exp())
