from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Projection, write_images
from torch import nn

from lightning_mvar.errors import InputError
from lightning_mvar.metrics import reference as module
from lightning_mvar.metrics.image_sets import open_image_set
from lightning_mvar.metrics.reference import load_reference, measure
from lightning_mvar.metrics.summary import Summary, prepare


@pytest.fixture
def extractor() -> Projection:
    torch.manual_seed(0)
    return Projection().requires_grad_(False)


def test_a_reference_is_mean_covariance_and_features_of_all_images(extractor: Projection) -> None:
    images = open_image_set("digits:test", 32)
    found = measure(extractor, images, "")
    features = extractor(torch.cat([*images.batches(0, len(images))])).double().numpy()
    np.testing.assert_allclose(found.statistics.mu, features.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.statistics.sigma, np.cov(features, rowvar=False), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-6)


def test_no_more_features_are_kept_than_are_used_spread_over_all_images(
    extractor: Projection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FEATURES", 10)
    images = open_image_set("digits:test", 32)
    found = measure(extractor, images, "")
    everything = torch.cat([*images.batches(0, 450)])
    expected = extractor(everything[np.linspace(0, 449, 10).round().astype(int)])
    torch.testing.assert_close(found.features, expected)


def test_it_is_measured_once_for_each_extractor(extractor: Projection, tmp_path: Path) -> None:
    first = load_reference(extractor, "digits:test", 32, tmp_path)
    calls = extractor.calls
    again = load_reference(extractor, "digits:test", 32, tmp_path)
    assert extractor.calls == calls
    assert torch.equal(first.statistics.sigma, again.statistics.sigma)
    assert first.features is not None
    assert torch.equal(first.features, again.features)
    extractor.linear.bias += 1
    other = load_reference(extractor, "digits:test", 32, tmp_path)
    assert not torch.equal(other.statistics.mu, first.statistics.mu)
    assert len(list(tmp_path.iterdir())) == 2


def published_file(path: Path, extractor: Projection, pixels: np.ndarray | None) -> None:
    """The keys of the files that ADM and OpenAI publish."""
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(50, extractor.num_features))
    arrays = {"mu": sample.mean(axis=0), "sigma": np.cov(sample, rowvar=False), "mu_s": np.zeros(2023)}
    np.savez(path, **arrays, **({} if pixels is None else {"arr_0": pixels}))


def test_published_statistics_load_by_path(extractor: Projection, tmp_path: Path) -> None:
    path = tmp_path / "VIRTUAL_imagenet8_labeled.npz"
    published_file(path, extractor, None)
    found = load_reference(extractor, str(path), 8, tmp_path)
    assert found.statistics.mu.shape == (12,)
    assert found.features is None
    pixels = np.random.default_rng(1).integers(0, 256, (70, 8, 8, 3)).astype(np.uint8)
    published_file(path, extractor, pixels)
    found = load_reference(extractor, str(path), 8, tmp_path)
    calls = extractor.calls
    again = load_reference(extractor, str(path), 8, tmp_path)
    assert extractor.calls == calls
    expected = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    for reference in (found, again):
        torch.testing.assert_close(reference.features, expected)
        assert torch.equal(reference.statistics.mu, torch.from_numpy(np.load(path)["mu"]))
    assert load_reference(extractor, str(path), 8, tmp_path, with_features=False).features is None
    published_file(path, extractor, pixels[0])
    with pytest.raises(InputError, match="arr_0 must be uint8 N x H x W x 3, got uint8 8 x 8 x 3"):
        load_reference(extractor, str(path), 8, tmp_path)


class Spatial(Projection):
    """Has spatial features too: the mean of each row."""

    num_spatial = 8

    def features_and_spatial(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(images), nn.functional.adaptive_avg_pool2d(images, 8).mean(dim=(1, 3))


def test_spatial_features_have_statistics_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    extractor = Spatial().requires_grad_(False)
    found = load_reference(extractor, "digits:test", 32, tmp_path)
    again = load_reference(extractor, "digits:test", 32, tmp_path)
    images = torch.cat([*open_image_set("digits:test", 32).batches(0, 450)])
    spatial = nn.functional.adaptive_avg_pool2d(images, 8).mean(dim=(1, 3)).double().numpy()
    for reference in (found, again):
        assert reference.spatial is not None
        np.testing.assert_allclose(reference.spatial.mu, spatial.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(reference.spatial.sigma, np.cov(spatial, rowvar=False), rtol=1e-4, atol=1e-9)


def test_a_statistics_file_of_ones_own_is_a_reference_for_the_same_weights_alone(
    extractor: Projection, tmp_path: Path
) -> None:
    path = tmp_path / "own.npz"
    measured = load_reference(extractor, "digits:test", 32, tmp_path / "cache")
    measured.save(path, extractor)
    found = load_reference(extractor, str(path), 32, tmp_path / "cache")
    assert torch.equal(found.statistics.sigma, measured.statistics.sigma)
    assert found.features is not None
    assert torch.equal(found.features, measured.features)
    extractor.linear.bias += 1
    with pytest.raises(InputError, match=r"own\.npz was made with an extractor of weights [0-9a-f]{16}, not [0-9a-f]"):
        load_reference(extractor, str(path), 32, tmp_path / "cache")


def test_images_without_statistics_are_measured(extractor: Projection, tmp_path: Path) -> None:
    """As another model's samples are, or real images that somebody keeps in an npz."""
    pixels = np.random.default_rng(1).integers(0, 256, (70, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    found = load_reference(extractor, str(tmp_path / "images.npz"), 8, tmp_path / "cache")
    features = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).double().numpy()
    np.testing.assert_allclose(found.statistics.mu, features.mean(axis=0), rtol=1e-5)


def test_damaged_and_foreign_files_are_named(extractor: Projection, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(InputError, match=r"statistics\.npz does not exist"):
        Summary.load(path, extractor)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="Projection makes 12 features: it was made with another extractor"):
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


def test_too_few_images_and_no_extractors_are_refused(extractor: Projection, tmp_path: Path) -> None:
    write_images(tmp_path / "images", per_class=1)
    for name in ("light", "mixed"):
        (tmp_path / "images" / name / "0.png").unlink()
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        measure(extractor, open_image_set(str(tmp_path / "images"), 8), "")
    with pytest.raises(InputError, match="Linear is no feature extractor"):
        prepare(nn.Linear(2, 2), torch.device("cpu"))
