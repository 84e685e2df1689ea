"""Monge distance between the features of two image sets (MIND, arXiv 2605.06797).

    3 f E_u W_2^2(u . x, u . y)

is the sliced Wasserstein distance: features of both sets are projected on random unit vectors u, and in one dimension
sorting gives the optimal transport. f is the number of features. With as many generated as real images the value equals
torch-fidelity's. With unequal numbers, W_2 is still that of all features, whereas torch-fidelity reduces the larger set
to the size of the smaller. Like the Frechet distance, it is biased upwards, and less so with more images.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

PROJECTIONS = 1000
SEED = 2020  # torch-fidelity's default, so that both draw the same vectors
BLOCK_PROJECTIONS = 100  # projections in memory at a time
BLOCK_ROWS = 4096  # feature vectors in float64 at a time


def monge_distance(real: Tensor, generated: Tensor, projections: int = PROJECTIONS) -> float:
    """Returns MIND of generated features (m, f) and real ones (n, f), on their device in float64."""
    num_features = real.shape[1]
    directions = torch.randn(projections, num_features, generator=Generator().manual_seed(SEED))
    directions = normalize(directions.to(real.device, torch.float64), dim=1)
    distances = [
        squared_wasserstein(project(real, block), project(generated, block))
        for block in directions.split(BLOCK_PROJECTIONS)
    ]
    return 3 * num_features * float(torch.cat(distances).mean())


def project(features: Tensor, directions: Tensor) -> Tensor:
    """Returns the projections (p, n) float64 of features (n, f) on directions (p, f)."""
    return torch.cat([directions @ rows.double().T for rows in features.split(BLOCK_ROWS)], dim=1)


def squared_wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """Returns the squared 2-Wasserstein distances (p,) between p pairs of one-dimensional samples, (p, n) and (p, m).

    It is the integral over [0, 1] of the squared difference of the quantile functions, which are step functions: sorted
    samples, with steps of width 1 / n and 1 / m. In units of 1 / nm, the steps end at multiples of m and of n.
    """
    n, m = a.shape[1], b.shape[1]
    a, b = a.sort(dim=1).values, b.sort(dim=1).values
    steps = torch.arange(1, max(n, m) + 1, device=a.device)
    ends = torch.cat([steps[:n] * m, steps[:m] * n]).unique()
    widths = ends.diff(prepend=ends.new_zeros(1))
    differences = a[:, (ends - 1) // m] - b[:, (ends - 1) // n]
    return differences.square() @ widths.to(a.dtype) / (n * m)
