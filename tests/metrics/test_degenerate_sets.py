"""Image sets and statistics that scores are not defined for: reported in one line, never a traceback or a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Pixels

from lightning_mvar.data.builtin.digits import DIGITS
from lightning_mvar.devices import warn
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.accuracy import samples_and_labels
from lightning_mvar.metrics.evaluator import Evaluator
from lightning_mvar.metrics.frechet import FeatureStatistics
from lightning_mvar.metrics.image_sets import SourceImages
from lightning_mvar.metrics.reference import open_reference
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Summary, feed_shard, prepare
from lightning_mvar.sampling.readers import open_samples


@pytest.fixture
def evaluator(tmp_path: Path) -> Evaluator:
    return Evaluator(prepare(Pixels(), torch.device("cpu")), (8, 8), tmp_path / "cache", None, 0)


def write_set(path: Path, count: int, seed: int = 0) -> str:
    np.savez(path, np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
    return str(path)


def test_a_floor_of_the_same_images_has_no_ratio(
    evaluator: Evaluator, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    real = evaluator.summary(open_reference(write_set(tmp_path / "real.npz", 9)))
    same = open_reference(write_set(tmp_path / "same.npz", 9))
    assert set(evaluator.floor_scores(5.0, real, same)) == {"floor_frechet_distance"}
    assert "zero up to rounding, so no ratio is reported: pass other real images as --floor" in capfd.readouterr().err
    other = evaluator.floor_scores(5.0, real, open_reference(write_set(tmp_path / "other.npz", 9, seed=1)))
    assert other["frechet_distance_over_floor"] == 5.0 / other["floor_frechet_distance"]


def test_a_floor_has_a_ratio_if_its_distance_is_beyond_rounding(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, other = (open_reference(write_set(tmp_path / f"{seed}.npz", 9, seed=seed)) for seed in range(2))
    summaries = evaluator.summary(real), evaluator.summary(other)
    variances = sum(float(summary.statistics.sigma.trace()) for summary in summaries)
    for relative, has_ratio in ((1e-10, False), (1e-8, True)):  # rounding is 1e-9
        distance = relative * variances
        monkeypatch.setattr("lightning_mvar.metrics.evaluator.frechet_distance", lambda *_, found=distance: found)
        assert ("frechet_distance_over_floor" in evaluator.floor_scores(5.0, summaries[0], other)) == has_ratio


@pytest.mark.parametrize(("labels", "named"), [(range(0, 2000, 100), 100), (range(-5, 15), -5)])
def test_labels_that_the_reference_does_not_have_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], labels: range, named: int
) -> None:
    np.savez(tmp_path / "drawn.npz", np.zeros((20, 8, 8, 3), np.uint8), np.array(labels))
    assert samples_and_labels(open_samples(tmp_path / "drawn.npz"), DIGITS) is None
    message = f"the samples have the label {named}, but digits have labels 0 to 9: class accuracy is not measured"
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("distributed", [True, False])
def test_the_only_process_warns_with_and_without_torch_distributed(
    capfd: pytest.CaptureFixture[str], distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not distributed:
        monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
        monkeypatch.delattr(torch.distributed, "is_initialized")  # as in a torch that was built without it
    warn("too few")
    assert capfd.readouterr().err == "warning: too few\n"


@pytest.mark.parametrize("count", [2, 4])
def test_a_reference_of_few_images_is_told_and_has_no_precision_if_it_has_no_fifth_neighbor(
    evaluator: Evaluator, tmp_path: Path, capfd: pytest.CaptureFixture[str], count: int
) -> None:
    real = evaluator.summary(open_reference(write_set(tmp_path / "real.npz", count)))
    message = capfd.readouterr().err
    assert f"real.npz has {count} images for 4 features: its covariance is singular" in message
    assert "there is no precision or recall" in message
    scores = Scores(evaluator.extractor, real, 9)
    feed_shard(SourceImages(open_samples(write_set(tmp_path / "drawn.npz", 9, seed=1))), scores, "")
    values = scores.compute()
    assert "precision" not in values
    assert min(values["fid"], values["mind"]) > 0


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (np.triu(np.ones((4, 4))), "sigma is not a covariance: it must be symmetric and positive semi-definite"),
        (-np.eye(4), "sigma is not a covariance"),
        (np.eye(4) + 2 * np.eye(4)[::-1], "sigma is not a covariance"),
        (np.full((4, 4), 1e300), "sigma must be finite numbers"),
        (np.full((4, 4), np.nan), "sigma must be finite numbers"),
        (np.eye(4).astype(object), "damaged"),
        (np.eye(3), r"has mu \(4,\) and sigma \(3, 3\)"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path: Path, sigma: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=sigma)
    with pytest.raises(InputError, match=message):
        Summary.load(tmp_path / "stats.npz", Pixels())


@pytest.mark.parametrize("dtype", [">f8", "f4", "g", "i8"])
def test_statistics_may_have_any_type_of_numbers(tmp_path: Path, dtype: str) -> None:
    sample = np.random.default_rng(0).normal(size=(5, 4)) * 10  # fewer images than features: singular
    sigma = np.cov(sample, rowvar=False) if dtype != "i8" else np.eye(4)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4, dtype), sigma=sigma.astype(dtype))
    assert Summary.load(tmp_path / "stats.npz", Pixels()).statistics.sigma.dtype == torch.float64


def test_features_that_are_not_finite_are_named() -> None:
    statistics = FeatureStatistics(2)
    statistics.update(torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, 1.0]]))
    with pytest.raises(InputError, match="the extractor returned features that are not finite"):
        statistics.compute()


def test_a_command_may_print_an_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "real.npz", 9)
    reference = open_reference(f"pipe:cat {tmp_path}/real.npz")
    assert (reference.kind, reference.has_images, len(reference.images(8))) == ("npz", True, 9)
    assert open_reference("pipe:tar -xOf all.tar shards/{}").kind == "shards"
    assert open_reference("https://host/v1.2/train?signature=a.tar").kind == "shards"
