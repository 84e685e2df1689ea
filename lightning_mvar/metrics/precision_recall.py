"""Precision and recall of generated features against real ones (arXiv 1904.06991).

The manifold of a feature set is estimated as the union of balls around its features; each radius is the distance to the
k-th nearest other feature. Precision is the fraction of generated features on the real manifold, recall the fraction of
real features on the generated one. Both depend on the extractor, on k and on the set sizes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from tqdm import tqdm

from lightning_mvar.devices import is_first_rank
from lightning_mvar.errors import InputError

BLOCK_ROWS = 512  # rows of the distance matrix in memory at a time
ROUNDING = 1e-12  # generous bound on the relative error of a sum of a few thousand float64 products


class FeatureBank(Metric):
    """Stores all feature vectors of a set in float32, gathered over all ranks.

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
        # Without this, torchmetrics gathers (0,) from a rank without features, which does not concatenate with (n, f).
        self.features.append(torch.empty(0, self.num_features, device=self.device))

    def update(self, features: Tensor) -> None:
        """Adds features (b, num_features); b may be 0."""
        self.features.append(features.detach().float())

    def compute(self) -> Tensor:
        """Returns features (n, num_features) float32, ordered by rank."""
        return dim_zero_cat(self.features)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Returns precision and recall of generated features (m, f) against real ones (n, f), each in [0, 1].

    Computed on the tensors' device in float64, in O((n + m)^2 f) time and O((n + m) f) memory.

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
    """Returns the fraction of points (m, f) inside the union of closed balls around centres (n, f)."""
    mean = centres.mean(dim=0, dtype=torch.float64)  # subtracted to avoid cancellation far from the origin
    centres, points = (features.to(torch.float64, copy=True).sub_(mean) for features in (centres, points))
    squares = centres.square().sum(dim=1)
    nearest = [
        squared_distances(rows, centres, squares).topk(neighbours + 1, largest=False).values
        for rows in row_blocks(centres, "neighbours")
    ]
    radii = torch.cat(nearest)[:, -1] * (1 + ROUNDING)  # k + 1 because the nearest is the centre itself
    inside = [
        (squared_distances(rows, centres, squares) <= radii).any(dim=1) for rows in row_blocks(points, "coverage")
    ]
    return float(torch.cat(inside).double().mean())


def row_blocks(features: Tensor, progress: str) -> Iterable[Tensor]:
    """Splits features (n, f) into blocks of rows; rank 0 shows a progress bar if it takes long."""
    return tqdm(features.split(BLOCK_ROWS), progress, leave=False, delay=5, disable=not is_first_rank())


def squared_distances(rows: Tensor, centres: Tensor, squares: Tensor) -> Tensor:
    """Returns the squared distances (r, n) between rows (r, f) and centres (n, f), all float64.

    Computed as |a|^2 + |b|^2 - 2 ab, a matrix product, which is much faster than summing squared differences. Values
    within rounding error are set to 0: equal features must be at distance 0, even in a ball of radius 0, which k + 1
    equal features make.

    Args:
        rows: feature vectors.
        centres: feature vectors.
        squares: squared norms (n,) of the centres.
    """
    sums = rows.square().sum(dim=1)[:, None] + squares
    distances = torch.addmm(sums, rows, centres.T, alpha=-2)
    return distances.masked_fill_(distances < ROUNDING * sums, 0)
