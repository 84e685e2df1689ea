"""Kernel distance between the features of two image sets (KID, arXiv 1801.01401).

The unbiased estimate of the squared maximum mean discrepancy under the kernel

    (x . y / f + 1)^3,    f the number of features,

averaged over random subsets. Its expectation does not depend on the numbers of images, unlike that of the Frechet
distance; between sets of the same distribution it is 0, so single values may be negative.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from lightning_mvar.errors import InputError

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020  # torch-fidelity's default, so that both draw the same subsets


def kernel_distance(
    real: Tensor, generated: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """Returns mean and population standard deviation over the subsets, on the tensors' device in float64.

    Args:
        real: features (n, f) of real images.
        generated: features (m, f) of generated images.
        subsets: number of pairs of subsets.
        subset_size: images per subset, drawn without replacement; at most n and m.

    Raises:
        InputError: if a set has fewer than two features.
    """
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise InputError(
            f"a kernel distance needs at least 2 features in each set, "
            f"got {len(real)} real and {len(generated)} generated"
        )
    rng = np.random.RandomState(SEED)
    distances = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(rng.choice(len(features), size, replace=False)).to(features.device)].double()
            for features in (generated, real)
        )
        distances.append(poly_mmd(x, y))
    values = torch.stack(distances)
    return float(values.mean()), float(values.std(correction=0))
