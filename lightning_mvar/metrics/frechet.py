"""Frechet distance between the features of two image sets (FID, arXiv 1706.08500).

    |mu_1 - mu_2|^2 + tr(sigma_1) + tr(sigma_2) - 2 tr((sigma_1 sigma_2)^(1/2))

The value depends on the extractor: only InceptionV3 with the published preprocessing is comparable to published FID.
The last trace is computed as the nuclear norm of sigma_1^(1/2) sigma_2^(1/2): the distance of a set to itself is then 0
up to rounding, even if its covariance is singular.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mvar.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK_ROWS = 1024  # feature vectors in float64 at a time
Sums = TypeVar("Sums", bound="FeatureSums")


@dataclass
class Statistics:
    """Mean (f,) and covariance (f, f) of feature vectors, float64 on the CPU."""

    mu: Tensor
    sigma: Tensor

    @cached_property
    def root(self) -> Tensor:
        """Square root (f, f) of the covariance; cached, because a reference is compared repeatedly."""
        values, vectors = torch.linalg.eigh(self.sigma)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding makes some eigenvalues negative


class FeatureSums(Metric):
    """Running float64 sums over the feature vectors (b, f) of all ranks: count, sum, and sum of outer products.

    `options` are those of torchmetrics, such as `sync_on_compute=False` for the sums of this rank only.
    """

    full_state_update = False

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(**options)
        self.total: Tensor
        self.outer: Tensor
        self.n: Tensor
        self.add_state("total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, features: Tensor) -> None:
        features = features.double()
        self.total += features.sum(dim=0)
        self.outer += features.T @ features
        self.n += len(features)

    def without(self, part: Self) -> Self:
        """Returns these sums without those of a part of the features, for this rank only."""
        rest = deepcopy(self)
        for name, value in part.metric_state.items():
            setattr(rest, name, getattr(self, name) - value)
        return rest


class FeatureStatistics(FeatureSums):
    """Accumulates features (b, f) into `Statistics`."""

    def compute(self) -> Statistics:
        """Returns mean and covariance; raises InputError for fewer than two feature vectors, or non-finite ones."""
        n = int(self.n)
        if n < 2:
            raise InputError(f"a Frechet distance needs at least 2 images, got {n}")
        if not (self.total.isfinite().all() and self.outer.isfinite().all()):
            raise InputError("the extractor returned features that are not finite: check its weights and its precision")
        mu = self.total / n
        sigma = (self.outer - n * torch.outer(mu, mu)) / (n - 1)
        return Statistics(mu.cpu(), sigma.cpu())


def statistics_of(features: Tensor) -> Statistics:
    """Returns mean and covariance of this rank's features (n, f); raises InputError like `compute`."""
    return local_sums(FeatureStatistics, features).compute()


def local_sums(kind: type[Sums], features: Tensor) -> Sums:
    """Returns the sums of this rank's features (n, f)."""
    sums = kind(features.shape[1], sync_on_compute=False).to(features.device)
    for rows in features.split(BLOCK_ROWS):
        sums.update(rows)
    return sums


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns the distance between two sets of features from the same extractor.

    Raises:
        InputError: if the feature dimensions differ.
    """
    if a.mu.shape != b.mu.shape:
        raise InputError(
            f"cannot compare statistics of {len(a.mu)} and {len(b.mu)} features: use the same extractor for both"
        )
    cross = torch.linalg.matrix_norm(a.root @ b.root, ord="nuc")
    return float((a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * cross)
