"""Accuracies of classifiers on digits, for references of either split."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from lightning_mvar.data.builtin.base import Split
from lightning_mvar.data.builtin.digits import DIGITS
from lightning_mvar.metrics.accuracy import (
    accuracy,
    digits_svm_accuracy,
    real_images,
    reconstruction_accuracy,
    sample_accuracy,
)
from lightning_mvar.metrics.classifiers.digits import DigitsClassifier, svm_accuracy


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> DigitsClassifier:
    return DigitsClassifier(str(tmp_path_factory.mktemp("cache") / "weights.safetensors"), epochs=1)


def test_svm_trained_on_samples_is_tested_on_the_references_split() -> None:
    (train, train_labels), (test, test_labels) = DIGITS.load("train"), DIGITS.load("test")
    train, test = (train + 1) / 2, (test + 1) / 2
    samples = train[:60] * 0.7, train_labels[:60]
    on_train, on_test = digits_svm_accuracy(samples, "train"), digits_svm_accuracy(samples, "test")
    assert on_train["svm_accuracy_trained_on_samples"] == svm_accuracy(*samples, train, train_labels)
    assert on_test["svm_accuracy_trained_on_samples"] == svm_accuracy(*samples, test, test_labels)
    assert on_train["svm_accuracy_on_samples"] == on_test["svm_accuracy_on_samples"]
    assert "svm_accuracy_on_reference" not in on_train
    assert on_test["svm_accuracy_on_reference"] == svm_accuracy(train, train_labels, test, test_labels)


def test_validation_digits_are_scored_by_classifiers_that_have_not_seen_them() -> None:
    (train, train_labels), (held_out, held_out_labels) = DIGITS.load("subtrain"), DIGITS.load("validation")
    train, held_out = (train + 1) / 2, (held_out + 1) / 2
    samples = held_out[:60] * 0.7, held_out_labels[:60]
    record = digits_svm_accuracy(samples, "validation")
    assert record["svm_accuracy_on_reference"] == svm_accuracy(train, train_labels, held_out, held_out_labels)
    assert record["svm_accuracy_on_samples"] == svm_accuracy(train, train_labels, *samples)
    assert record["svm_accuracy_trained_on_samples"] == svm_accuracy(*samples, held_out, held_out_labels)
    assert "svm_accuracy_on_reference" not in digits_svm_accuracy(samples, "subtrain")


class Unlabeled:
    """A set of samples without classes."""

    def labels(self, class_names: list[str]) -> None:
        return None


def test_no_classifier_is_tested_on_its_training_images(classifier: DigitsClassifier) -> None:
    assert sample_accuracy(Unlabeled(), DIGITS, "train", classifier) == {}
    assert "classifier_accuracy_on_reference" not in sample_accuracy(Unlabeled(), DIGITS, "validation", classifier)
    images, labels = DIGITS.load("test")
    record = sample_accuracy(Unlabeled(), DIGITS, "test", classifier)
    assert record["classifier_accuracy_on_reference"] == accuracy(classifier, (images + 1) / 2, labels)


class Unchanged:
    """Reconstructions that equal their originals."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, begin: int, end: int) -> Iterator[Tensor]:
        yield self.images[begin:end]


def test_no_classifier_is_tested_on_reconstructions_of_its_training_images(classifier: DigitsClassifier) -> None:
    def record(split: Split) -> dict[str, float]:
        return reconstruction_accuracy(Unchanged(real_images(DIGITS, split)[0]), DIGITS, split, classifier)

    assert record("train") == record("subtrain") == {}
    assert [*record("validation")] == ["svm_accuracy_on_reconstructions"]
    originals = sample_accuracy(Unlabeled(), DIGITS, "test", classifier)
    assert record("test") == {name.replace("reference", "reconstructions"): value for name, value in originals.items()}
