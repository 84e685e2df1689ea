from pathlib import Path

import torch

from lightning_mvar.data.builtin.digits import DIGITS, load_digits
from lightning_mvar.data.builtin.photos import PHOTOS, PHOTOS64
from lightning_mvar.metrics.digits import DigitsClassifier
from lightning_mvar.metrics.judges import kept_classifier
from lightning_mvar.metrics.photos import Photos64Classifier, PhotosClassifier


def test_the_classifier_tells_photos_apart_and_is_kept(tmp_path: Path) -> None:
    classifier = PhotosClassifier(str(tmp_path / "photos_classifier.safetensors"), epochs=6)
    images, labels = PHOTOS.load("test")
    images = (images + 1) / 2
    assert (classifier.classify(images) == labels).float().mean() > 0.75
    features = classifier(images)
    assert features.shape == (450, classifier.num_features)
    assert classifier.logits(features).shape == (450, 10)
    kept = kept_classifier("photos:test", str(tmp_path))
    assert isinstance(kept, PhotosClassifier)
    assert torch.equal(kept(images), features)
    assert kept_classifier(str(tmp_path), str(tmp_path)) is None


def test_larger_patches_have_a_classifier_of_their_own(tmp_path: Path) -> None:
    Photos64Classifier(str(tmp_path / "photos64_classifier.safetensors"), epochs=2)
    classifier = kept_classifier("photos64:test", str(tmp_path))
    assert isinstance(classifier, Photos64Classifier)
    images, labels = PHOTOS64.load("test")
    assert (classifier.classify((images + 1) / 2) == labels).float().mean() > 0.4


def test_training_depends_on_nothing_outside(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(len(weights))
        weights.append(PhotosClassifier(str(tmp_path / name), epochs=1).head.weight)
    assert torch.equal(*weights)


def test_photos_are_varied_by_shifts_and_mirroring(tmp_path: Path) -> None:
    classifier = PhotosClassifier(str(tmp_path / "weights"), epochs=1)
    wide = PHOTOS.load_wide("test")[0][:3]
    allowed = [wide[:, :, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    allowed += [images.flip(3) for images in allowed]
    torch.manual_seed(0)
    drawn = [classifier.vary(wide) for _ in range(60)]
    found = [[torch.equal(varied, images) for images in allowed].index(True) for varied in drawn]
    assert len(set(found)) > 30
    assert min(found) < 81 <= max(found)


def test_digits_are_varied_by_rolling_them(tmp_path: Path) -> None:
    """As they always were: the weights must not change, for scores in them to stay comparable."""
    classifier = DigitsClassifier(str(tmp_path / "weights"), epochs=1)
    torch.manual_seed(3)
    varied = classifier.vary(DIGITS.load_wide("test")[0])
    torch.manual_seed(3)
    shift = torch.randint(-2, 3, (2,)).tolist()
    assert torch.equal(varied, load_digits("test")[0].roll(shift, dims=(2, 3)))
