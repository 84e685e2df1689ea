from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Projection, write_images
from torch import nn

from lightning_mvar.errors import InputError
from lightning_mvar.metrics import reference as module
from lightning_mvar.metrics.reference import measure, open_reference
from lightning_mvar.metrics.summary import Summary, prepare


@pytest.fixture
def extractor() -> Projection:
    torch.manual_seed(0)
    return Projection().requires_grad_(False)


def test_a_reference_is_mean_covariance_and_features_of_all_images(extractor: Projection) -> None:
    images = open_reference("digits:test").images(32)
    summary = measure(extractor, images, "")
    features = extractor(torch.cat([*images.batches(0, len(images))])).double().numpy()
    np.testing.assert_allclose(summary.statistics.mu, features.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(summary.statistics.sigma, np.cov(features, rowvar=False), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(summary.features, features, rtol=1e-4, atol=1e-6)


def test_features_are_limited_and_spaced_evenly_over_all_images(
    extractor: Projection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REAL_FEATURES", 10)
    images = open_reference("digits:test").images(32)
    summary = measure(extractor, images, "")
    pixels = torch.cat([*images.batches(0, 450)])
    expected = extractor(pixels[np.linspace(0, 449, 10).round().astype(int)])
    torch.testing.assert_close(summary.features, expected)


def test_a_reference_is_measured_once_per_extractor(extractor: Projection, tmp_path: Path) -> None:
    first = open_reference("digits:test").summary(extractor, 32, tmp_path)
    calls = extractor.calls
    cached = open_reference("digits:test").summary(extractor, 32, tmp_path)
    assert extractor.calls == calls
    assert torch.equal(first.statistics.sigma, cached.statistics.sigma)
    assert first.features is not None
    assert torch.equal(first.features, cached.features)
    extractor.linear.bias += 1
    other = open_reference("digits:test").summary(extractor, 32, tmp_path)
    assert not torch.equal(other.statistics.mu, first.statistics.mu)
    assert len(list(tmp_path.iterdir())) == 2


def write_published_file(path: Path, extractor: Projection, pixels: np.ndarray | None) -> None:
    """Writes random statistics under the keys of the files that ADM and OpenAI publish."""
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(50, extractor.num_features))
    arrays = {"mu": sample.mean(axis=0), "sigma": np.cov(sample, rowvar=False), "mu_s": np.zeros(2023)}
    np.savez(path, **arrays, **({} if pixels is None else {"arr_0": pixels}))


def test_published_statistics_load_by_path(extractor: Projection, tmp_path: Path) -> None:
    path = tmp_path / "VIRTUAL_imagenet8_labeled.npz"
    write_published_file(path, extractor, None)
    summary = open_reference(str(path)).summary(extractor, 8, tmp_path)
    assert summary.statistics.mu.shape == (12,)
    assert summary.features is None
    pixels = np.random.default_rng(1).integers(0, 256, (70, 8, 8, 3)).astype(np.uint8)
    write_published_file(path, extractor, pixels)
    summary = open_reference(str(path)).summary(extractor, 8, tmp_path)
    calls = extractor.calls
    cached = open_reference(str(path)).summary(extractor, 8, tmp_path)
    assert extractor.calls == calls
    expected = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    for reference in (summary, cached):
        torch.testing.assert_close(reference.features, expected)
        assert torch.equal(reference.statistics.mu, torch.from_numpy(np.load(path)["mu"]))
    write_published_file(path, extractor, pixels[0])
    with pytest.raises(InputError, match="arr_0 must be uint8 N x H x W x 3, got uint8 8 x 8 x 3"):
        open_reference(str(path)).summary(extractor, 8, tmp_path)


class Spatial(Projection):
    """Projection with spatial features: the mean of each row."""

    num_spatial = 8

    def features_and_spatial(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(images), nn.functional.adaptive_avg_pool2d(images, 8).mean(dim=(1, 3))


def test_spatial_features_have_their_own_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    extractor = Spatial().requires_grad_(False)
    summary = open_reference("digits:test").summary(extractor, 32, tmp_path)
    cached = open_reference("digits:test").summary(extractor, 32, tmp_path)
    images = torch.cat([*open_reference("digits:test").images(32).batches(0, 450)])
    spatial = nn.functional.adaptive_avg_pool2d(images, 8).mean(dim=(1, 3)).double().numpy()
    for reference in (summary, cached):
        assert reference.spatial is not None
        np.testing.assert_allclose(reference.spatial.mu, spatial.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(reference.spatial.sigma, np.cov(spatial, rowvar=False), rtol=1e-4, atol=1e-9)


def test_a_saved_statistics_file_is_a_reference_for_the_same_weights_only(
    extractor: Projection, tmp_path: Path
) -> None:
    path = tmp_path / "own.npz"
    measured = open_reference("digits:test").summary(extractor, 32, tmp_path / "cache")
    measured.save(path, extractor)
    summary = open_reference(str(path)).summary(extractor, 32, tmp_path / "cache")
    assert torch.equal(summary.statistics.sigma, measured.statistics.sigma)
    assert summary.features is not None
    assert torch.equal(summary.features, measured.features)
    extractor.linear.bias += 1
    with pytest.raises(InputError, match=r"own\.npz was computed with extractor weights [0-9a-f]{16}, not [0-9a-f]"):
        open_reference(str(path)).summary(extractor, 32, tmp_path / "cache")


def test_references_of_different_crops_are_measured_apart_and_not_mixed(extractor: Projection, tmp_path: Path) -> None:
    write_images(tmp_path / "images", per_class=2)
    folder, cache, own = str(tmp_path / "images"), tmp_path / "cache", tmp_path / "own.npz"
    var, adm = (open_reference(folder, crop=crop).summary(extractor, 8, cache) for crop in ("var", "adm"))
    assert (var.crop, adm.crop) == ("var", "adm")
    assert not torch.equal(var.statistics.mu, adm.statistics.mu)
    assert open_reference(folder, crop="adm").summary(extractor, 8, cache).crop == "adm"  # from the cache
    adm.save(own, extractor)
    assert open_reference(str(own), crop="adm").summary(extractor, 8, cache).crop == "adm"
    with pytest.raises(InputError, match=r"own\.npz were cropped by adm, not var: use crop adm$"):
        open_reference(str(own)).summary(extractor, 8, cache)
    whole = open_reference(folder, margin=1.0).summary(extractor, 8, cache)
    assert whole.crop == "var-1.0"
    assert not torch.equal(var.statistics.mu, whole.statistics.mu)
    whole.save(own, extractor)
    with pytest.raises(InputError, match=r"cropped by var-1.0, not var: use crop var and margin 1.0$"):
        open_reference(str(own)).summary(extractor, 8, cache)
    var.save(own, extractor)
    with pytest.raises(InputError, match=r"cropped by var, not var-1.0: use crop var and margin 1.125$"):
        open_reference(str(own), margin=1.0).summary(extractor, 8, cache)
    assert open_reference("digits:test").summary(extractor, 32, cache).crop == "none"


def test_a_part_of_a_remote_archive_is_a_reference_of_images() -> None:
    for name in ("https://host/pictures.tar", "https://host/pictures.tar:val"):
        assert open_reference(name).kind == "images"
    assert open_reference("https://host/shards").kind == "shards"


class MeanPool(nn.Module):
    """Extractor without weights."""

    num_features = 12

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


class MaxPool(MeanPool):
    """Extractor of the same number of features as `MeanPool`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.adaptive_max_pool2d(images, 2).flatten(1)


def test_extractors_without_weights_differ_by_class_and_arguments(tmp_path: Path) -> None:
    reference = open_reference("digits:test")
    cached = [reference.summary(pool, 32, tmp_path / "cache") for pool in (MeanPool(), MeanPool(100.0), MaxPool())]
    assert len({float(summary.statistics.mu.sum()) for summary in cached}) == 3
    path = tmp_path / "own.npz"
    cached[0].save(path, MeanPool())
    Summary.load(path, MeanPool())
    for other in (MeanPool(100.0), MaxPool()):
        with pytest.raises(
            InputError, match=r"computed with extractor '\w+\.MeanPool\(scale=1\.0\)', not '\w+\.M.*Pool\("
        ):
            Summary.load(path, other)


def test_images_without_statistics_are_measured(extractor: Projection, tmp_path: Path) -> None:
    """Covers samples of other models, and real images in an npz."""
    pixels = np.random.default_rng(1).integers(0, 256, (70, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    summary = open_reference(str(tmp_path / "images.npz")).summary(extractor, 8, tmp_path / "cache")
    features = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).double().numpy()
    np.testing.assert_allclose(summary.statistics.mu, features.mean(axis=0), rtol=1e-5)


def test_damaged_and_foreign_files_are_refused(extractor: Projection, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(InputError, match=r"statistics\.npz does not exist"):
        Summary.load(path, extractor)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="Projection has 12 features: the file was computed with another extractor"):
        Summary.load(path, extractor)
    for mu in (np.array(["a"] * 12), np.full(12, np.nan)):
        np.savez(path, mu=mu, sigma=np.eye(12))
        with pytest.raises(InputError, match=r"statistics\.npz: mu must be finite numbers, got an array of"):
            Summary.load(path, extractor)
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12), features=np.zeros((5, 3)))
    with pytest.raises(InputError, match=r"has features \(5, 3\), not \(n, 12\)"):
        Summary.load(path, extractor)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(InputError, match="has no array mu; it holds other"):
        Summary.load(path, extractor)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"statistics\.npz is damaged"):
        Summary.load(path, extractor)


def test_too_few_images_and_other_modules_are_refused(extractor: Projection, tmp_path: Path) -> None:
    write_images(tmp_path / "images", per_class=1)
    for name in ("light", "mixed"):
        (tmp_path / "images" / name / "0.png").unlink()
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        measure(extractor, open_reference(str(tmp_path / "images")).images(8), "")
    with pytest.raises(InputError, match="Linear is not a feature extractor"):
        prepare(nn.Linear(2, 2), torch.device("cpu"))
