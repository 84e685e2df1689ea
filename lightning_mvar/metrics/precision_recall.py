"""Precision, recall, density and coverage of generated features against real ones.

Each feature of a set is the center of a closed ball, whose radius is the distance to the k-th nearest other feature of
the set. All four scores depend on the extractor, on k and on the set sizes.

    precision  fraction of generated features inside at least one real ball          (arXiv 1904.06991, k = 3)
    recall     fraction of real features inside at least one generated ball
    density    number of real balls around a generated feature, divided by k; mean   (arXiv 2002.09797, k = 5)
    coverage   fraction of real balls with at least one generated feature inside
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from tqdm import tqdm

from lightning_mvar.devices import is_first_rank
from lightning_mvar.errors import InputError

DENSITY_NEIGHBORS = 5  # k of density and coverage, as published
BLOCK_ROWS = 512  # rows of the distance matrix in memory at a time
ROUNDING = 1e-12  # generous bound on the relative error of a sum of a few thousand float64 products


class FeatureBank(Metric):
    """Stores feature vectors of a set in float32, gathered over all ranks.

    Args:
        num_features: length of a feature vector.
    """

    full_state_update = False

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.features: list[Tensor]
        self.indices: list[Tensor]
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("indices", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        super().reset()
        # Without these, torchmetrics gathers (0,) from a rank without features, which does not concatenate with (n, f).
        self.features.append(torch.empty(0, self.num_features, device=self.device))
        self.indices.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def update(self, features: Tensor, indices: Tensor) -> None:
        """Adds features (b, num_features) of the images with indices (b,) int64 in the set; b may be 0."""
        self.features.append(features.detach().float())
        self.indices.append(indices.to(features.device))

    def compute(self) -> Tensor:
        """Returns features (n, num_features) float32, ordered by index for any number of ranks."""
        return dim_zero_cat(self.features)[dim_zero_cat(self.indices).argsort()]


def enough_neighbors(real: Tensor, generated: Tensor, neighbors: int) -> bool:
    """Returns whether both sets have as many features as `precision_recall` needs."""
    return max(neighbors, DENSITY_NEIGHBORS) < min(len(real), len(generated))


def precision_recall(real: Tensor, generated: Tensor, neighbors: int = 3) -> dict[str, float]:
    """Returns `precision`, `recall` and `coverage` in [0, 1] and `density` >= 0.

    Computed on the tensors' device in float64, in O((n + m)^2 f) time and O((n + m) f) memory.

    Args:
        real: features (n, f) of real images.
        generated: features (m, f) of generated images.
        neighbors: k of precision and recall; that of density and coverage is `DENSITY_NEIGHBORS`.

    Raises:
        InputError: if a set has too few features.
    """
    if neighbors < 1 or not enough_neighbors(real, generated, neighbors):
        raise InputError(
            f"precision, recall, density and coverage need neighbors >= 1 and more than "
            f"{max(neighbors, DENSITY_NEIGHBORS)} features in each set, "
            f"got {neighbors} neighbors, {len(real)} real and {len(generated)} generated features"
        )
    (scores,) = precision_recall_without(
        real, generated, torch.zeros(len(generated), dtype=torch.int64), [None], neighbors
    )
    return scores


def precision_recall_without(
    real: Tensor, generated: Tensor, groups: Tensor, left_out: Sequence[int | None], neighbors: int
) -> list[dict[str, float]]:
    """Returns the scores with each of several groups of generated features left out, in one pass over all pairs.

    Args:
        real: features (n, f) of real images.
        generated: features (m, f) of generated images.
        groups: group (m,) of each generated feature.
        left_out: the groups; None to leave out nothing.
        neighbors: k of precision and recall.
    """
    mean = real.mean(dim=0, dtype=torch.float64)  # subtracted to avoid cancellation far from the origin
    real, generated = (features.to(torch.float64, copy=True).sub_(mean) for features in (real, generated))
    radii, density_radii = squared_radii(real, [neighbors, DENSITY_NEIGHBORS])
    kept = torch.stack([torch.ones_like(groups, dtype=torch.bool) if g is None else groups != g for g in left_out])
    kept = kept.to(real.device)  # (len(left_out), m)
    generated_radii = radii_without(generated, groups.to(real.device), left_out, neighbors)

    squares, shape = real.square().sum(dim=1), (len(left_out), len(real))
    precise, balls = torch.zeros(2, len(left_out), dtype=torch.int64, device=real.device)
    recalled, covered = torch.zeros(2, *shape, dtype=torch.bool, device=real.device)
    blocks = (kept.split(BLOCK_ROWS, dim=1), generated_radii.split(BLOCK_ROWS, dim=1))
    for rows, row_kept, row_radii in zip(row_blocks(generated, "precision and recall"), *blocks, strict=True):
        distances = squared_distances(rows, real, squares)
        precise += (row_kept & (distances <= radii).any(dim=1)).sum(dim=1)
        inside = distances <= density_radii
        balls += (row_kept * inside.sum(dim=1)).sum(dim=1)
        for i, (chosen, own_radii) in enumerate(zip(row_kept, row_radii, strict=True)):
            recalled[i] |= (distances <= own_radii.where(chosen, -1)[:, None]).any(dim=0)
            covered[i] |= inside[chosen].any(dim=0)
    return [
        {
            "precision": int(precise[i]) / int(count),
            "recall": int(recalled[i].sum()) / len(real),
            "density": int(balls[i]) / int(count) / DENSITY_NEIGHBORS,
            "coverage": int(covered[i].sum()) / len(real),
        }
        for i, count in enumerate(kept.sum(dim=1))
    ]


def squared_radii(features: Tensor, neighbors: list[int]) -> Tensor:
    """Returns squared distances (len(neighbors), n) of features (n, f) to their k-th nearest neighbor, for each k."""
    squares = features.square().sum(dim=1)
    nearest = [
        squared_distances(rows, features, squares).topk(max(neighbors) + 1, largest=False).values
        for rows in row_blocks(features, "neighbors")
    ]
    return torch.cat(nearest)[:, neighbors].T * (1 + ROUNDING)  # column 0 is the feature itself


def radii_without(features: Tensor, groups: Tensor, left_out: Sequence[int | None], neighbor: int) -> Tensor:
    """Returns squared distances (len(left_out), n) of features (n, f) to the k-th nearest neighbor outside each group.

    It is among the k + 1 nearest features of each of the other groups. Radii of the group itself have no meaning.
    """
    squares, radii = features.square().sum(dim=1), []
    members = {group: (groups == group).nonzero().flatten() for group in groups.unique().tolist()}
    for rows in row_blocks(features, "neighbors"):
        distances = squared_distances(rows, features, squares)
        nearest = {
            group: distances[:, columns].topk(min(neighbor + 1, len(columns)), largest=False).values
            for group, columns in members.items()
        }
        others = [torch.cat([nearest[group] for group in members if group != g], dim=1) for g in left_out]
        radii.append(torch.stack([near.topk(neighbor + 1, largest=False).values[:, neighbor] for near in others]))
    return torch.cat(radii, dim=1) * (1 + ROUNDING)


def row_blocks(features: Tensor, progress: str) -> Iterable[Tensor]:
    """Splits features (n, f) into blocks of rows; rank 0 shows a progress bar if processing them takes long."""
    return tqdm(features.split(BLOCK_ROWS), progress, leave=False, delay=5, disable=not is_first_rank())


def squared_distances(rows: Tensor, centers: Tensor, squares: Tensor) -> Tensor:
    """Returns the squared distances (r, n) between rows (r, f) and centers (n, f), all float64.

    Computed as |a|^2 + |b|^2 - 2 ab, a matrix product, which is much faster than summing squared differences. Values
    within rounding error are set to 0: equal features must be at distance 0, because k + 1 of them have balls of
    radius 0.

    Args:
        rows: feature vectors.
        centers: feature vectors.
        squares: squared norms (n,) of the centers.
    """
    sums = rows.square().sum(dim=1)[:, None] + squares
    distances = torch.addmm(sums, rows, centers.T, alpha=-2)
    return distances.masked_fill_(distances < ROUNDING * sums, 0)
