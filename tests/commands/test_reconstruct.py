"""Tests of `reconstruct` against plain loops over the same images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Pixels
from PIL import Image
from torch import Tensor

from lightning_mvar import ScaleSchedule, Tokenizer, TokenizerConfig
from lightning_mvar.checkpoints import load_tokenizer, save_folder
from lightning_mvar.cli import run
from lightning_mvar.data.images.protocols import CropProtocol
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.metrics.frechet import Statistics, frechet_distance
from lightning_mvar.metrics.perturbation import PerturbedScores

CONFIG = TokenizerConfig(ScaleSchedule((1, 2, 4)), 24, 4, channels=8, multipliers=(1, 1, 2), blocks=1, num_phi=2)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with a tokenizer for 16 x 16 images in `tok` and eleven images in `images`."""
    torch.manual_seed(0)
    save_folder(tmp_path / "tok", Tokenizer(CONFIG).eval())
    for i in range(11):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((30, 25)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gaussian_ssim(a: Tensor, b: Tensor) -> float:
    """Returns the published SSIM of two images (3, H, W) in [0, 1]: 11 x 11 window, sigma 1.5, reflected edges."""
    kernel = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = torch.outer(kernel, kernel) / kernel.sum() ** 2
    mean = lambda x: F.conv2d(F.pad(x[:, None], (5,) * 4, mode="reflect"), window[None, None])  # noqa: E731
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return float(similarity.mean())


@pytest.mark.parametrize(("batch_size", "crop"), [("4", "var"), ("100", "adm")])
def test_scores_are_those_of_a_plain_loop(workspace: Path, batch_size: str, crop: CropProtocol) -> None:
    command = ["reconstruct", "--tokenizer", "tok", "--images", "images", "--extractor", "conftest.Pixels"]
    options = ["--crop", crop, "--perturb", "true", "--batch_size", batch_size]
    assert run([*command, *options, "--json", "scores.json", "--picture", "pairs.png"]) == 0
    (record,) = json.loads((workspace / "scores.json").read_text())
    source = open_images("images", 16, crop=crop)
    images = torch.stack([source[i].image for i in range(11)])
    tokenizer = load_tokenizer("tok")
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        pairs = [((a + 1) / 2, (b + 1) / 2) for a, b in zip(images, tokenizer.decode(tokens), strict=True)]
    psnr = torch.stack([-10 * (a - b).square().mean().log10() for a, b in pairs]).mean()
    assert (record["num_images"], record["crop"]) == (11, crop)
    assert record["skipped_images"] == 0
    assert record["psnr_db"] == pytest.approx(float(psnr), rel=1e-5)
    assert record["ssim"] == pytest.approx(sum(gaussian_ssim(a, b) for a, b in pairs) / 11, abs=1e-4)
    assert record["codebook_usage"] == pytest.approx(len(tokens.unique()) / 24)
    extractor = Pixels()
    sets = [extractor(torch.stack(side)).double() for side in zip(*pairs, strict=True)]
    statistics = [Statistics(features.mean(0), features.T.cov()) for features in sets]
    assert record["frechet_distance"] == pytest.approx(frechet_distance(*statistics), rel=1e-4)
    perturbed = PerturbedScores(tokenizer, extractor)
    perturbed.update(tokens)
    assert record["perturbed_frechet_distance"] == pytest.approx(perturbed.compute(statistics[0]), rel=1e-4)
    with Image.open("pairs.png") as picture:
        assert picture.size == (8 * 18 + 2, 2 * 18 + 2)
        for column, number in ((0, 0), (1, 1), (2, 3), (7, 10)):  # spread over the 11 images
            corner = tuple(int(v) for v in ((images[number, :, 0, 0] + 1) * 127.5).round())
            assert picture.getpixel((2 + 18 * column, 2)) == corner


def test_without_an_extractor_there_is_no_distance_and_damaged_images_are_counted(
    workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (workspace / "images/a/0.png").write_bytes(b"no picture")
    command = ["reconstruct", "--tokenizer", "tok", "--images", "images", "--json", "scores.json"]
    assert run(command) == 1
    assert "images/a/0.png cannot be decoded" in capfd.readouterr().err
    assert run([*command, "--on_corrupt", "skip"]) == 0
    (record,) = json.loads((workspace / "scores.json").read_text())
    assert (record["num_images"], record["skipped_images"]) == (10, 1)
    assert "frechet_distance" not in record
    assert run([*command, "--perturb", "true"]) == 1
    assert "--perturb compares features: pass an --extractor" in capfd.readouterr().err


def test_too_few_images_are_reported(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in sorted((workspace / "images").rglob("*.png"))[1:]:
        path.write_bytes(b"")
    command = ["reconstruct", "--tokenizer", "tok", "--images", "images", "--on_corrupt", "skip"]
    assert run(command) == 0
    assert run([*command, "--extractor", "conftest.Pixels"]) == 1
    assert "1 images of images could be decoded: too few to compare" in capfd.readouterr().err
