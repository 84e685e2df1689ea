"""An extractor trained on a folder of pictures: 64 x 64 pixels, whatever the size of the images."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.classifiers import own_images
from lightning_mvar.metrics.classifiers.own_images import ImageClassifier
from lightning_mvar.metrics.frechet import Statistics
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Summary, prepare


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Noise with horizontal or vertical stripes, of two sizes."""
    monkeypatch.setattr(own_images, "STEPS", 30)
    rng = np.random.default_rng(0)
    for i in range(40):
        size, name = (96, 40)[i % 2], ("across", "down")[i // 20]
        stripes = np.tile(np.arange(size)[:, None] // 8 % 2, (1, size)) * 160
        pixels = (stripes if name == "across" else stripes.T)[..., None] + rng.integers(0, 90, (size, size, 3))
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def classifier_of(folder: Path, **options: Any) -> ImageClassifier:
    return ImageClassifier(str(folder), cache=str(folder.parent / "cache"), **options)


def test_it_is_trained_on_first_use_and_then_shared(folder: Path) -> None:
    classifier, cache = classifier_of(folder), folder.parent / "cache"
    assert not cache.exists()  # neither is anything written, before a command has checked its other inputs
    with torch.inference_mode():
        prepare(classifier, torch.device("cpu"))
    (weights,) = cache.glob("*.safetensors")
    images, labels = classifier.training_images()
    assert images.shape == (40, 3, 64, 64)
    assert (classifier.classify(images / 255) == labels).float().mean() > 0.9
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    written = weights.stat().st_mtime_ns
    again = classifier_of(folder)
    assert torch.equal(again(images[:4] / 255), classifier(images[:4] / 255))
    large = torch.rand(2, 3, 130, 80)
    small = F.interpolate(large, (64, 64), mode="bilinear", antialias=True)
    assert torch.equal(again(large), again(small))
    assert weights.stat().st_mtime_ns == written
    (folder / "down/39.png").unlink()
    assert classifier_of(folder).path != weights  # other images, another classifier


def test_broken_images_are_skipped_if_allowed(folder: Path) -> None:
    (folder / "down/39.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"39\.png cannot be decoded"):
        classifier_of(folder).training_images()
    images, labels = classifier_of(folder, on_corrupt="skip").training_images()
    assert (len(images), labels.tolist()) == (39, [0] * 20 + [1] * 19)


def test_shifts_are_random_and_reflect_the_border(folder: Path) -> None:
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    classifier = classifier_of(folder)
    torch.manual_seed(0)
    augmented = classifier.augment(images)
    torch.manual_seed(0)
    top, left = torch.randint(9, (2,)).tolist()
    for y, x in ((0, 0), (31, 5), (63, 63)):
        row, column = (63 - abs(63 - abs(start + offset - 4)) for start, offset in ((top, y), (left, x)))
        torch.testing.assert_close(augmented[:, :, y, x], images[:, :, row, column] / 127.5 - 1)


def test_an_interrupted_training_is_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(classifier: ImageClassifier, images: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageClassifier, "augment", interrupt)
    classifier = classifier_of(folder)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            classifier(torch.rand(1, 3, 64, 64))
    assert not list((folder.parent / "cache").glob("*.safetensors"))


def test_images_of_one_class_are_classified_by_their_quarter_turns(folder: Path) -> None:
    upright, _ = classifier_of(folder).training_images()
    shutil.rmtree(folder / "down")
    classifier = classifier_of(folder)
    images, turns = classifier.training_images()
    assert turns.bincount().tolist() == [20] * 4
    for image, turn in zip(images, turns.tolist(), strict=True):
        assert any(np.array_equal(np.rot90(image, -turn, (1, 2)), original) for original in upright[:20])
    assert classifier.head.out_features == 4
    real = Summary(Statistics(torch.zeros(64), torch.eye(64)))
    assert Scores(classifier, real, num_samples=20).inception is None
