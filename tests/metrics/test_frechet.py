import numpy as np
import pytest
import torch
from conftest import Projection
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.frechet import FeatureStatistics, Statistics, frechet_distance


def image_statistics(extractor: Projection, images: torch.Tensor) -> Statistics:
    metric = FeatureStatistics(extractor.num_features)
    metric.update(extractor(images))
    return metric.compute()


@pytest.fixture
def extractor() -> Projection:
    torch.manual_seed(0)
    return Projection().requires_grad_(False)


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(300, 3, 8, 8, generator=generator), torch.rand(200, 3, 8, 8, generator=generator) * 0.8


def test_statistics_are_mean_and_covariance(extractor: Projection, sets: tuple) -> None:
    statistics = image_statistics(extractor, sets[0])
    features = extractor(sets[0]).double().numpy()
    np.testing.assert_allclose(statistics.mu, features.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(statistics.sigma, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-12)


def test_the_distance_agrees_with_torchmetrics(extractor: Projection, sets: tuple) -> None:
    metric = FrechetInceptionDistance(feature=extractor.double())
    metric.update(sets[0].double(), real=True)
    metric.update(sets[1].double(), real=False)
    ours = frechet_distance(*(image_statistics(extractor, images.double()) for images in sets))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)
    assert ours > 0.01


def test_the_distance_of_two_gaussians_in_closed_form() -> None:
    a = Statistics(torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([1.0, 4.0]).double()))
    b = Statistics(torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([9.0, 4.0]).double()))
    assert frechet_distance(a, b) == pytest.approx(9 + (1 - 3) ** 2)


@pytest.mark.parametrize("count", [5, 300])
def test_the_distance_of_a_set_to_itself_is_0_even_if_the_covariance_is_singular(
    extractor: Projection, sets: tuple, count: int
) -> None:
    statistics = image_statistics(extractor, sets[0][:count])
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-6)


def test_batched_updates_equal_a_single_update(extractor: Projection, sets: tuple) -> None:
    features = extractor(sets[0])
    single, batched = FeatureStatistics(12), FeatureStatistics(12)
    single.update(features)
    for batch in features.split(37):
        batched.update(batch)
    torch.testing.assert_close(batched.compute().sigma, single.compute().sigma)
    torch.testing.assert_close(batched.compute().mu, single.compute().mu)


def test_statistics_of_other_extractors_are_refused(extractor: Projection, sets: tuple) -> None:
    statistics = image_statistics(extractor, sets[0])
    with pytest.raises(InputError, match="statistics of 12 and 3 features: use the same extractor for both"):
        frechet_distance(statistics, Statistics(torch.zeros(3), torch.eye(3)))


def test_a_single_image_has_no_covariance(extractor: Projection, sets: tuple) -> None:
    with pytest.raises(InputError, match="needs at least 2 images, got 1"):
        image_statistics(extractor, sets[0][:1])
