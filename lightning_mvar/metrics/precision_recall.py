"""Precision and recall of generated features against real ones (arXiv 1904.06991).

A set of features stands for the manifold it was drawn from: the union of balls around each, with the distance to its
k-th nearest other feature as radius. Precision is the share of generated features on the real manifold, recall the
share of real features on the generated one. Both depend on the extractor, on k and on the sizes of the sets.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from tqdm import tqdm

from lightning_mvar.errors import InputError

ROWS = 512  # of a distance matrix, held at once
ROUNDING = 1e-12  # of sums of a few thousand float64 products, with room to spare


class FeatureBank(Metric):
    """Keeps every feature vector of a set, gathered over all ranks, float32.

    Args:
        num_features: length of a feature vector.
    """

    full_state_update = False

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.features: list[Tensor]
        self.add_state("features", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        super().reset()
        # For a rank without features torchmetrics would gather an empty (0,), which fits no other rank's (n, f).
        self.features.append(torch.empty(0, self.num_features, device=self.device))

    def update(self, features: Tensor) -> None:
        """Features (b, num_features), also with b = 0."""
        self.features.append(features.detach().float())

    def compute(self) -> Tensor:
        """Features (n, num_features) float32, rank after rank."""
        return dim_zero_cat(self.features)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of generated features (m, f) against real ones (n, f), each in [0, 1].

    Computed on the tensors' device, in float64; the time grows with (n + m)^2 f, the memory with (n + m) f.

    Raises:
        InputError: if a set has no `neighbours`-th nearest other feature.
    """
    if not 1 <= neighbours < min(len(real), len(generated)):
        raise InputError(
            "precision and recall need 1 <= neighbours < features in each set, "
            f"got {neighbours} neighbours, {len(real)} real and {len(generated)} generated features"
        )
    return coverage(real, generated, neighbours), coverage(generated, real, neighbours)


def coverage(centres: Tensor, points: Tensor, neighbours: int) -> float:
    """Share of points (m, f) in the union of the balls around centres (n, f); a ball has its boundary."""
    middle = centres.mean(dim=0, dtype=torch.float64)  # far from the origin, squares would cancel
    centres, points = (features.to(torch.float64, copy=True).sub_(middle) for features in (centres, points))
    squares = centres.square().sum(dim=1)
    nearest = [
        squared_distances(rows, centres, squares).topk(neighbours + 1, largest=False).values
        for rows in in_rows(centres, "neighbours")
    ]
    radii = torch.cat(nearest)[:, -1] * (1 + ROUNDING)  # a centre is its own nearest, at distance 0
    inside = [(squared_distances(rows, centres, squares) <= radii).any(dim=1) for rows in in_rows(points, "coverage")]
    return float(torch.cat(inside).double().mean())


def in_rows(features: Tensor, progress: str) -> Iterable[Tensor]:
    """Features (n, f) in parts; the first rank shows how it goes, where it takes long."""
    hidden = dist.is_initialized() and dist.get_rank() > 0
    return tqdm(features.split(ROWS), progress, leave=False, delay=5, disable=hidden)


def squared_distances(rows: Tensor, centres: Tensor, squares: Tensor) -> Tensor:
    """(r, f) and (n, f), whose squared lengths are `squares` (n,) -> (r, n), all float64.

    By |a|^2 + |b|^2 - 2 ab, a product of matrices, which takes a fraction of the time that sums of differences do. What
    is too small for float64 to tell from rounding counts as 0: equal features are at distance 0, also where k + 1 of
    them leave a ball of radius 0.
    """
    sums = rows.square().sum(dim=1)[:, None] + squares
    found = torch.addmm(sums, rows, centres.T, alpha=-2)
    return found.masked_fill_(found < ROUNDING * sums, 0)
