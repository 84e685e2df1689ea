from pathlib import Path

import torch

from lightning_mvar.data.builtin.digits import load_digits
from lightning_mvar.metrics.classifiers.digits import DigitsClassifier, svm_accuracy


def test_the_classifier_recognizes_real_digits_and_saves_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    classifier = DigitsClassifier(str(path), epochs=8)
    images, labels = load_digits("test")
    images = (images + 1) / 2
    assert (classifier.classify(images) == labels).float().mean() > 0.95
    features = classifier(images)
    assert features.shape == (450, classifier.num_features)
    reloaded = DigitsClassifier(str(path))
    assert torch.equal(reloaded(images), features)


def test_training_is_deterministic(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(len(weights))
        weights.append(DigitsClassifier(str(tmp_path / name), epochs=1).state_dict()["head.weight"])
    assert torch.equal(*weights)


def test_the_support_vector_machine_classifies_scans() -> None:
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    train, test = (train + 1) / 2, (test + 1) / 2
    assert svm_accuracy(train, train_labels, test, test_labels) > 0.98
    assert svm_accuracy(train, train_labels, test, (test_labels + 1) % 10) < 0.02
