import pytest
import torch

from lightning_mvar.metrics.class_distances import ClassLabels, class_distances
from lightning_mvar.metrics.frechet import FeatureStatistics, frechet_distance


@pytest.mark.parametrize("width", [5, 20])  # fewer and more features than images of a class
def test_distances_of_classes_are_frechet_distances_of_their_images(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(n, width, generator=generator) + 9 for n in (40, 30))
    labels = ClassLabels(torch.arange(40) % 4, torch.arange(30) % 3, ["a", "b", "c", "only real"])
    generated[labels.generated == 1] += 2
    distances = class_distances(real, generated, labels)
    assert next(iter(distances)) == "b"
    assert distances.keys() == {"a", "b", "c"}
    for label, name in enumerate("abc"):
        statistics = []
        for features, of_set in ((real, labels.real), (generated, labels.generated)):
            metric = FeatureStatistics(width)
            metric.update(features[of_set == label])
            statistics.append(metric.compute())
        assert distances[name] == pytest.approx(frechet_distance(*statistics), rel=1e-9)


def test_a_class_without_two_images_in_both_sets_has_no_distance() -> None:
    labels = ClassLabels(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1]), ["a", "b"])
    assert class_distances(torch.rand(4, 9), torch.rand(3, 9), labels).keys() == {"b"}
