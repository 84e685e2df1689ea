from pathlib import Path

import pytest
import torch

from lightning_mvar.data.builtin.digits import DIGITS, load_digits
from lightning_mvar.data.builtin.photos import PHOTOS, PHOTOS64
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.accuracy import classifier_for
from lightning_mvar.metrics.classifiers.digits import DigitsClassifier
from lightning_mvar.metrics.classifiers.photos import Photos64Classifier, PhotosClassifier
from lightning_mvar.metrics.reference import open_reference


def test_the_classifier_recognizes_photos_and_is_cached(tmp_path: Path) -> None:
    classifier = PhotosClassifier(str(tmp_path / "photos_classifier.safetensors"), epochs=6)
    images, labels = PHOTOS.load("test")
    images = (images + 1) / 2
    assert (classifier.classify(images) == labels).float().mean() > 0.75
    features = classifier(images)
    assert features.shape == (450, classifier.num_features)
    assert classifier.logits(features).shape == (450, 10)
    cached = classifier_for(open_reference("photos:test"), str(tmp_path))
    assert isinstance(cached, PhotosClassifier)
    assert torch.equal(cached(images), features)
    assert classifier_for(open_reference(str(tmp_path)), str(tmp_path)) is None


def test_larger_patches_have_their_own_classifier(tmp_path: Path) -> None:
    Photos64Classifier(str(tmp_path / "photos64_classifier.safetensors"), epochs=2).load_or_train()
    classifier = classifier_for(open_reference("photos64:test"), str(tmp_path))
    assert isinstance(classifier, Photos64Classifier)
    images, labels = PHOTOS64.load("test")
    assert (classifier.classify((images + 1) / 2) == labels).float().mean() > 0.4


def test_training_does_not_depend_on_the_global_generator(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(len(weights))
        weights.append(PhotosClassifier(str(tmp_path / name), epochs=1).state_dict()["head.weight"])
    assert torch.equal(*weights)


def test_photos_are_augmented_by_crops_and_flips(tmp_path: Path) -> None:
    classifier = PhotosClassifier(str(tmp_path / "weights"), epochs=1)
    images = PHOTOS.load_with_margin("test")[0][:3]
    crops = [images[:, :, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    crops += [crop.flip(3) for crop in crops]
    torch.manual_seed(0)
    batches = [classifier.augment(images) for _ in range(60)]
    indices = [[torch.equal(batch, crop) for crop in crops].index(True) for batch in batches]
    assert len(set(indices)) > 30
    assert min(indices) < 81 <= max(indices)


def test_digits_are_augmented_by_rolling(tmp_path: Path) -> None:
    """Pins the augmentation: other weights would make scores incomparable with earlier ones."""
    classifier = DigitsClassifier(str(tmp_path / "weights"), epochs=1)
    torch.manual_seed(3)
    augmented = classifier.augment(DIGITS.load_with_margin("test")[0])
    torch.manual_seed(3)
    shift = torch.randint(-2, 3, (2,)).tolist()
    assert torch.equal(augmented, load_digits("test")[0].roll(shift, dims=(2, 3)))


def test_training_needs_epochs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"PhotosClassifier's epochs must be in \[1, 10000\], got 0"):
        PhotosClassifier(str(tmp_path / "weights.safetensors"), epochs=0)
    with pytest.raises(InputError, match=r"PhotosClassifier's epochs must be in \[1, 10000\], got 1000000000"):
        PhotosClassifier(str(tmp_path / "weights.safetensors"), epochs=10**9)
