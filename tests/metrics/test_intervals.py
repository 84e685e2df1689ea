import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.frechet import Statistics, frechet_distance
from lightning_mvar.metrics.intervals import (
    GROUPS,
    Uncertainty,
    assign_groups,
    extrapolated_distance,
    jackknife_interval,
    t_quantile,
)


def statistics_of(features: Tensor) -> Statistics:
    return Statistics(features.double().mean(dim=0), features.double().T.cov())


def test_groups_are_equally_large_and_take_their_share_of_balanced_classes() -> None:
    sizes = assign_groups(1010).bincount()
    assert len(sizes) == GROUPS
    assert set(sizes.tolist()) == {50, 51}
    labels = torch.arange(10).repeat_interleave(100)
    for balanced in (labels, labels[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]):
        groups = assign_groups(1000, balanced.tolist())
        assert (torch.bincount(groups * 10 + balanced) == 5).all()
    unequal = [0] * 100 + [1] * 900
    assert torch.equal(assign_groups(1000, unequal), assign_groups(1000))


def test_quantiles_are_those_of_the_t_distribution() -> None:
    for probability, quantile in ((0.9, 1.327728), (0.975, 2.093024), (0.995, 2.860935)):  # of printed tables
        assert t_quantile(probability, 19) == pytest.approx(quantile, rel=1e-4)


def test_the_interval_of_a_mean_is_that_of_the_means_of_its_groups() -> None:
    """For a mean, the jackknife equals Student's interval of the 20 group means."""
    values = np.random.default_rng(0).normal(size=400)
    groups = assign_groups(400).numpy()
    replicates = [float(values[groups != group].mean()) for group in range(GROUPS)]
    means = [values[groups == group].mean() for group in range(GROUPS)]
    margin = 2.093024 * np.std(means, ddof=1) / np.sqrt(GROUPS)
    low, high = jackknife_interval(float(values.mean()), replicates, 0.95)
    assert (low, high) == pytest.approx((values.mean() - margin, values.mean() + margin), rel=1e-4)
    low, high = jackknife_interval(0.0, replicates, 0.95, share=0.25, noise=1.0)
    assert high == pytest.approx(2.093024 * np.sqrt((margin / 2.093024) ** 2 / 4 + 1), rel=1e-4)


def test_intervals_of_the_frechet_distance_cover_its_mean() -> None:
    """In 200 sets of 200 samples, 95 % intervals cover the mean distance of sets of that size."""
    generator, groups = torch.Generator().manual_seed(0), assign_groups(200)
    real = Statistics(torch.zeros(2).double(), torch.eye(2).double())
    distances, intervals = [], []
    for _ in range(200):
        samples = torch.randn(200, 2, generator=generator) * 1.2 + 0.3
        distances.append(frechet_distance(real, statistics_of(samples)))
        replicates = [frechet_distance(real, statistics_of(samples[groups != group])) for group in range(GROUPS)]
        intervals.append(jackknife_interval(distances[-1], replicates, 0.95))
    covered = [low <= np.mean(distances) <= high for low, high in intervals]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_the_extrapolated_distance_is_without_the_bias_of_few_samples() -> None:
    """The distance of 1,000 samples of the real distribution itself is 0.027 in 10 dimensions; the true one is 0."""
    real = Statistics(torch.zeros(10).double(), torch.eye(10).double())
    samples = torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
    assert abs(extrapolated_distance(real, samples)) < frechet_distance(real, statistics_of(samples)) / 3


def test_too_few_samples_and_impossible_levels_are_refused() -> None:
    with pytest.raises(InputError, match=r"--interval must be in \(0, 1\), such as 0\.95, got 95\.0"):
        Uncertainty(95.0)
    with pytest.raises(InputError, match="--interval needs at least 40 samples, got 39"):
        Uncertainty(0.95).check_count(39, 4)
    with pytest.raises(InputError, match="--extrapolate needs at least 400 samples for 100 features, got 399"):
        Uncertainty(extrapolate=True).check_count(399, 100)
