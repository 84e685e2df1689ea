"""Kernel distance between the features of two image sets (KID, arXiv 1801.01401).

It is the unbiased estimate of the squared maximum mean discrepancy under the kernel

    (x . y / f + 1)^3,    f the number of features,

averaged over random subsets. Unlike that of the Frechet distance, its expectation does not depend on the numbers of
images. It is 0 between sets of the same distribution, so single values may be negative.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics.image.kid import poly_mmd

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.intervals import GROUPS

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020  # torch-fidelity's default, so that both draw the same subsets
BLOCK_ROWS = 1024


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


def kernel_replicates(real: Tensor, generated: Tensor, groups: Tensor) -> list[float]:
    """Returns the kernel distances of all images with each group of the generated ones left out in turn.

    Sums of the kernel over pairs of groups suffice, so each pair of images is compared once.

    Args:
        real: features (n, f).
        generated: features (m, f), on the same device.
        groups: group (m,) of each generated image.
    """
    groups = groups.to(generated.device)
    sizes = groups.bincount(minlength=GROUPS).tolist()
    members, ones = one_hot(groups, GROUPS).double(), groups.new_ones(len(real), 1).double()
    within = members.T @ kernel_sums(generated, generated, members)  # (GROUPS, GROUPS)
    itself = members.T @ self_kernels(generated)  # (GROUPS,), pairs of an image with itself
    across = members.T @ kernel_sums(generated, real, ones)[:, 0]
    among_real = kernel_sums(real, real, ones).sum() - self_kernels(real).sum()
    n, values = len(real), []
    for group, size in enumerate(sizes):
        m = len(generated) - size
        pairs = within.sum() - 2 * within[group].sum() + within[group, group] - (itself.sum() - itself[group])
        cross = across.sum() - across[group]
        values.append(float(pairs / (m * (m - 1)) + among_real / (n * (n - 1)) - 2 * cross / (m * n)))
    return values


def kernel_sums(rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted sums (n, w) of the kernel of each row (n, f) with the columns (m, f), weights (m, w)."""
    columns = columns.double()
    blocks = (kernel(block.double() @ columns.T, rows.shape[1]) @ weights for block in rows.split(BLOCK_ROWS))
    return torch.cat([*blocks])


def self_kernels(features: Tensor) -> Tensor:
    """Returns the kernel (n,) of each feature vector (n, f) with itself."""
    return kernel(features.double().square().sum(dim=1), features.shape[1])


def kernel(products: Tensor, num_features: int) -> Tensor:
    """Returns the polynomial kernel of feature vectors with these inner products."""
    return (products / num_features + 1) ** 3
