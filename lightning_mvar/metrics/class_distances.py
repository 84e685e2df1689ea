"""Frechet distance of each class, to find the classes that a network draws worst.

They are comparable only between classes of one evaluation: with few images per class, their upward bias is large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mvar.metrics.frechet import frechet_distance, statistics_of


@dataclass(frozen=True)
class ClassLabels:
    """Labels of the real (n,) and generated (m,) images whose features are compared, int64, and the class names."""

    real: Tensor
    generated: Tensor
    names: list[str]


def class_distances(real: Tensor, generated: Tensor, labels: ClassLabels) -> dict[str, float]:
    """Returns the distance of each class that has at least two images in both sets, by name, largest first.

    Args:
        real: features (n, f) of real images.
        generated: features (m, f) of generated images, on the same device.
        labels: the images' labels.
    """
    distances = {}
    for label, name in enumerate(labels.names):
        a, b = (
            features[(set_labels == label).to(features.device)]
            for features, set_labels in ((real, labels.real), (generated, labels.generated))
        )
        if min(len(a), len(b)) > 1:
            few = min(len(a), len(b)) <= a.shape[1]
            distances[name] = distance_of_few(a, b) if few else frechet_distance(statistics_of(a), statistics_of(b))
    return dict(sorted(distances.items(), key=lambda item: -item[1]))


def distance_of_few(a: Tensor, b: Tensor) -> float:
    """Returns the Frechet distance of features (n, f) and (m, f), in float64, without f x f matrices.

    With x and y the centered features divided by sqrt(n - 1) and sqrt(m - 1), the covariances are x^T x and y^T y, and
    sigma_1^(1/2) sigma_2^(1/2) has the same singular values as x y^T, which is n x m.
    """
    means = [features.mean(dim=0, dtype=torch.float64) for features in (a, b)]
    x, y = ((features - mean) / (len(features) - 1) ** 0.5 for features, mean in zip((a, b), means, strict=True))
    cross = torch.linalg.matrix_norm(x @ y.T, ord="nuc")
    return float((means[0] - means[1]).square().sum() + x.square().sum() + y.square().sum() - 2 * cross)
