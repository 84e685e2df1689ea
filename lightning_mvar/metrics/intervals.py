"""Confidence intervals of scores over the samples, by the delete-a-group jackknife; the real images are held fixed.

The samples are split into 20 groups, and each score is computed 20 times, each time without one group. With t_g the
value without group g, the standard error and the interval are

    s^2 = (G - 1) / G sum_g (t_g - mean t)^2,    t +- s times the quantile of Student's t with G - 1 degrees of freedom

A bootstrap draws the same sample several times, which biases distances upwards and puts nearest neighbors at distance
0; here each image counts at most once. The interval covers the variation over sample sets of the same size from the
same network. It includes neither the bias of distances of few images nor the spread over training seeds.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from lightning_mvar.errors import InputError, require_in
from lightning_mvar.metrics.frechet import Statistics, frechet_distance, statistics_of

GROUPS = 20
METHOD = f"jackknife over samples, {GROUPS} groups"
EXTRAPOLATION_POINTS = 15  # numbers of samples, as in arXiv 1911.07023
MIN_SAMPLES_PER_FEATURE = 4  # with fewer, the bias is not yet inversely proportional to the number of samples
SEED = 0


@dataclass(frozen=True)
class Uncertainty:
    """Error bars to report with the scores.

    Args:
        interval: confidence level of the intervals; None for no intervals.
        extrapolate: whether to extrapolate the Frechet distance to infinitely many samples.

    Raises:
        InputError: if the level is not between 0 and 1.
    """

    interval: float | None = None
    extrapolate: bool = False

    def __post_init__(self) -> None:
        require_in("(0, 1)", "--", ", such as 0.95", interval=self.interval)

    def check_count(self, count: int, num_features: int) -> None:
        """Raises InputError if there are too few samples."""
        if self.interval is not None and count < 2 * GROUPS:
            raise InputError(f"--interval needs at least {2 * GROUPS} samples, got {count}")
        if self.extrapolate and count < MIN_SAMPLES_PER_FEATURE * num_features:
            raise InputError(
                f"--extrapolate needs at least {MIN_SAMPLES_PER_FEATURE * num_features} samples for {num_features} "
                f"features, got {count}"
            )


def assign_groups(count: int, labels: list[int] | None = None) -> Tensor:
    """Assigns samples to groups (count,) int64 at random; group sizes differ by at most one.

    If each class has the same number of samples, as in sets that networks draw, groups are stratified by class, because
    that number does not vary between such sets.
    """
    order = torch.randperm(count, generator=Generator().manual_seed(SEED))
    if labels is not None:
        classes = torch.tensor(labels)
        if len(set(classes.unique(return_counts=True)[1].tolist())) == 1:
            order = order[classes[order].argsort(stable=True)]
    groups = torch.empty(count, dtype=torch.int64)
    groups[order] = torch.arange(count) % GROUPS
    return groups


def jackknife_interval(
    value: float, replicates: list[float], level: float, share: float = 1.0, noise: float = 0.0
) -> tuple[float, float]:
    """Returns the interval around a score.

    Args:
        value: the score of all samples.
        replicates: the score without each group.
        level: probability that the interval covers the expected score of a set of this size.
        share: fraction of the samples that the replicates were computed from.
        noise: additional variance of the score, such as that of random subsets.
    """
    groups = len(replicates)
    variance = statistics.pvariance(replicates) * (groups - 1) * share + noise
    margin = t_quantile((1 + level) / 2, groups - 1) * math.sqrt(variance)
    return value - margin, value + margin


def t_quantile(probability: float, degrees: int) -> float:
    """Returns a quantile of Student's t distribution by the expansion 26.7.5 of Abramowitz and Stegun.

    With 19 degrees of freedom its relative error is below 1e-5 at 0.975 and below 1e-4 at 0.995.
    """
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def extrapolated_distance(real: Statistics, features: Tensor) -> float:
    """Returns the Frechet distance extrapolated to infinitely many samples (arXiv 1911.07023).

    The distance of N samples is biased by about c / N. It is computed for 15 random subsets of n / 10 (but at least
    2 f) to n samples, and the intercept of the least-squares line over 1 / N is returned.

    Args:
        real: statistics of the real images.
        features: features (n, f) of the samples, n at least 4 f.
    """
    count, num_features = features.shape
    sizes = np.linspace(max(count // 10, 2 * num_features), count, EXTRAPOLATION_POINTS).astype(int)
    generator, distances = Generator().manual_seed(SEED), []
    for size in sizes.tolist():
        subset = torch.randperm(count, generator=generator)[:size].to(features.device)
        distances.append(frechet_distance(real, statistics_of(features[subset])))
    return float(np.polyfit(1 / sizes, distances, 1)[1])
