from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import Projection
from processes import run_two_ranks
from torch import nn

from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.metrics import scores as module
from lightning_mvar.metrics.inception_score import InceptionScore
from lightning_mvar.metrics.intervals import assign_groups, jackknife_interval
from lightning_mvar.metrics.kernel_distance import kernel_distance, kernel_replicates
from lightning_mvar.metrics.mind import monge_distance
from lightning_mvar.metrics.precision_recall import precision_recall
from lightning_mvar.metrics.reference import measure, open_reference
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Features, Summary, prepare


class Classifier(Projection):
    """Projection with logits, for the inception score."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.num_features, 5)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features)


@pytest.fixture
def reference() -> Summary:
    torch.manual_seed(0)
    return measure(Projection(), open_reference("digits:test").images(32), "")


def compute_scores(extractor: Projection, reference: Summary, images: torch.Tensor, batch: int, **options: int) -> dict:
    scores = Scores(extractor, reference, len(images), **options)
    for indices in torch.arange(len(images)).split(batch):
        scores.update(images[indices], indices)
    scores.update(images[:0], torch.arange(0))
    return scores.compute()


def test_scores_do_not_depend_on_batches_and_equal_the_single_metrics(reference: Summary) -> None:
    torch.manual_seed(0)
    extractor, images = Classifier(), torch.rand(60, 3, 8, 8)
    scores = compute_scores(extractor, reference, images, 7)
    neighbor_scores = {"precision", "recall", "density", "coverage"}
    assert scores.keys() == {"fid", "kid", "kid_std", "mind", "is", "vendi"} | neighbor_scores
    for name, value in compute_scores(extractor, reference, images, 60).items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name
    with torch.no_grad():
        features = extractor(images)
    assert {name: scores[name] for name in neighbor_scores} == precision_recall(reference.features, features)
    assert (scores["kid"], scores["kid_std"]) == pytest.approx(kernel_distance(reference.features, features), rel=1e-6)
    assert scores["mind"] == pytest.approx(monge_distance(reference.features, features), rel=1e-6)
    assert 1 < scores["vendi"] < 12
    assert 1 <= scores["is"] <= 5
    without_neighbors = compute_scores(extractor, reference, images, 60, neighbors=0)
    assert without_neighbors.keys() == scores.keys() - neighbor_scores


class Spatial(Classifier):
    """Classifier with spatial features, for sFID."""

    num_spatial = 4

    def features_and_spatial(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(images), nn.functional.adaptive_avg_pool2d(images, (1, 2)).flatten(1)[:, :4].square()


@pytest.fixture(scope="module")
def spatial_scores() -> Scores:
    """Returns scores of 60 random images that keep their features, against 50 others."""
    return scores_of(random_images())


def random_images() -> torch.Tensor:
    return torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def empty_scores(count: int) -> Scores:
    torch.manual_seed(0)
    extractor, real = Spatial(), torch.rand(50, 3, 8, 8)
    features = Features(extractor, 50, 50)
    features.update(real, torch.arange(50))
    return Scores(extractor, features.compute(), count, keep_features=True, keep_spatial=True)


def scores_of(images: torch.Tensor) -> Scores:
    scores = empty_scores(len(images))
    scores.update(images, torch.arange(len(images)))
    return scores


def test_scores_without_a_group_equal_those_of_the_other_images(spatial_scores: Scores) -> None:
    images, groups = random_images(), assign_groups(60)
    replicates = spatial_scores.replicates(spatial_scores.kept_features(), groups)
    for group in (0, 13):
        kept = groups != group
        expected = scores_of(images[kept]).compute()
        inception = InceptionScore(5, 60)  # the other images keep their splits
        extractor = spatial_scores.extractor
        with torch.no_grad():
            inception.update(extractor.logits(extractor(images[kept])), kept.nonzero().flatten())
        expected["is"] = inception.compute()[0]
        assert replicates[group].keys() == {"fid", "sfid", "is", "vendi", "mind"}
        assert replicates[group] == pytest.approx({name: expected[name] for name in replicates[group]}, rel=1e-6)


def intervals(scores: Scores) -> dict[str, tuple[float, float]]:
    return scores.intervals(scores.compute(), 0.95, [0, 1] * 30)


def intervals_on_rank(rank: int, folder: Path) -> None:
    scores = empty_scores(60)  # before the ranks meet: each measures all real images
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=2, rank=rank)
    scores.update(random_images()[rank::2], torch.arange(rank, 60, 2))
    torch.save(intervals(scores), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_intervals_of_two_processes_equal_those_of_one(spatial_scores: Scores, tmp_path: Path) -> None:
    assert run_two_ranks(intervals_on_rank, tmp_path) == [0, 0]
    expected, values = intervals(spatial_scores), spatial_scores.compute()
    assert expected.keys() == values.keys() - {"kid_std"}
    assert all(low < values[name] < high for name, (low, high) in expected.items())
    for rank in range(2):
        for name, interval in torch.load(tmp_path / f"{rank}.pt").items():
            assert interval == pytest.approx(expected[name], rel=1e-6), name


def test_intervals_of_a_part_of_the_samples_are_those_of_all_and_that_of_kid_has_the_noise_of_its_subsets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_SAMPLE_FEATURES", 40)
    scores = scores_of(random_images())
    values, kept, real = scores.compute(), scores.kept_features(), scores.reference.features
    assert len(kept) == 40
    groups = assign_groups(40)
    replicates = kernel_replicates(real, kept, groups)
    found = scores.intervals(values, 0.95)
    noise = values["kid_std"] ** 2 / 100  # of the mean of 100 subsets
    assert found["kid"] == pytest.approx(jackknife_interval(values["kid"], replicates, 0.95, 40 / 60, noise))
    minds = [monge_distance(real, kept[groups != group]) for group in range(20)]
    assert found["mind"] == pytest.approx(jackknife_interval(values["mind"], minds, 0.95, 40 / 60), rel=1e-6)


def test_scores_that_extractor_or_reference_do_not_support_are_omitted(reference: Summary) -> None:
    torch.manual_seed(0)
    extractor, images = Projection(), torch.rand(20, 3, 8, 8)
    assert compute_scores(extractor, Summary(reference.statistics), images, 20).keys() == {"fid", "vendi"}
    few = compute_scores(extractor, reference, images[:5], 20)
    assert few.keys() == {"fid", "kid", "kid_std", "mind", "vendi"}  # without a fifth neighbor


def test_real_images_score_perfectly_against_themselves(reference: Summary) -> None:
    torch.manual_seed(0)
    source = open_reference("digits:test").images(32)
    images = torch.cat([*source.batches(0, len(source))])
    scores = compute_scores(Projection(), reference, images, 64)
    assert scores["fid"] == pytest.approx(0, abs=1e-6)
    assert scores["mind"] == pytest.approx(0, abs=1e-9)
    assert abs(scores["kid"]) < 1e-3
    assert scores["precision"] == scores["recall"] == scores["coverage"] == 1


def test_comparisons_with_real_features_use_a_limited_number_of_samples(
    reference: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SAMPLE_FEATURES", 20)
    torch.manual_seed(0)
    extractor, images = Projection(), torch.rand(58, 3, 8, 8)
    scores = compute_scores(extractor, reference, images, 7)
    with torch.no_grad():
        features = extractor(images[::3])  # of 58 images, the indices 0, 3, ... 57 are spaced evenly
    expected = precision_recall(reference.features, features)
    assert {name: scores[name] for name in expected} == expected


class Means(nn.Module):
    """An extractor without parameters."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def test_statistics_are_on_the_device_of_an_extractor_without_parameters() -> None:
    """NCCL reduces no tensors of a CPU."""
    prepared = prepare(Means(), torch.device("meta"))
    features = Features(prepared, 10, 0)
    features.update(torch.rand(10, 3, 4, 4, device="meta"), torch.arange(10))
    assert features.statistics.total.device.type == features.statistics.outer.device.type == "meta"
    assert fingerprint(prepared) == fingerprint(Means())
