"""Classifier accuracy on samples and reconstructions of the embedded sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_mvar.data.builtin.base import EmbeddedSet, Split
from lightning_mvar.data.builtin.digits import DIGITS
from lightning_mvar.devices import device_of, warn
from lightning_mvar.metrics.classifiers.digits import DigitsClassifier, svm_accuracy
from lightning_mvar.metrics.classifiers.embedded import EmbeddedClassifier
from lightning_mvar.metrics.classifiers.emoji import Emoji64Classifier
from lightning_mvar.metrics.classifiers.photos import Photos64Classifier, PhotosClassifier
from lightning_mvar.metrics.image_sets import Reconstructions, SourceImages
from lightning_mvar.metrics.reference import Reference
from lightning_mvar.sampling.readers import Samples

TRAINING_SPLIT: dict[Split, Split] = {  # split that an SVM is trained on, by the reference's split
    "train": "train",
    "test": "train",
    "subtrain": "subtrain",
    "validation": "subtrain",
}
CLASSIFIERS: dict[str, type[EmbeddedClassifier]] = {
    classifier.embedded.name: classifier
    for classifier in (DigitsClassifier, PhotosClassifier, Photos64Classifier, Emoji64Classifier)
}


def classifier_for(reference: Reference, folder: str) -> EmbeddedClassifier | None:
    """Returns the classifier of an embedded reference, cached in `folder`; None for any other reference."""
    if reference.embedded is None:
        return None
    name = reference.embedded[0].name
    return CLASSIFIERS[name](str(Path(folder) / f"{name}_classifier.safetensors"))


def sample_accuracy(images: Samples, embedded: EmbeddedSet, split: Split, extractor: nn.Module) -> dict[str, Any]:
    """Returns classifier accuracies on the samples, with their intended classes as labels, and on the reference.

    No classifier is tested on its own training images.
    """
    samples, record = samples_and_labels(images, embedded), dict[str, Any]()
    if embedded is DIGITS:
        record |= digits_svm_accuracy(samples, split)
    if is_classifier_of(extractor, embedded):
        if split == "test":
            record["classifier_accuracy_on_reference"] = accuracy(extractor, *real_images(embedded, split))
        if samples is not None:
            record["classifier_accuracy_on_samples"] = accuracy(extractor, *samples)
    return record


def digits_svm_accuracy(samples: tuple[Tensor, Tensor] | None, split: Split) -> dict[str, Any]:
    """Returns accuracies of SVMs trained on real digits and tested on samples, and vice versa.

    Real digits to test on are those of the reference's split. If that is `digits:validation`, SVMs are not trained on
    validation digits.
    """
    train, reference = real_images(DIGITS, TRAINING_SPLIT[split]), real_images(DIGITS, split)
    record: dict[str, Any] = {}
    if TRAINING_SPLIT[split] != split:
        record["svm_accuracy_on_reference"] = svm_accuracy(*train, *reference)
    if samples is not None:
        record["svm_accuracy_on_samples"] = svm_accuracy(*train, *samples)
        record["svm_accuracy_trained_on_samples"] = svm_accuracy(*samples, *reference)
    return record


def reconstruction_accuracy(
    decoded: Reconstructions, embedded: EmbeddedSet, split: Split, extractor: nn.Module
) -> dict[str, Any]:
    """Returns classifier accuracies on a tokenizer's reconstructions of the reference.

    No classifier is tested on reconstructions of its own training images.
    """
    has_svm = embedded is DIGITS and TRAINING_SPLIT[split] != split
    if not has_svm and split != "test":
        return {}
    pixels = torch.cat([batch.cpu() for batch in decoded.batches(0, len(decoded))])
    labels, record = real_images(embedded, split)[1], dict[str, Any]()
    if has_svm:
        record["svm_accuracy_on_reconstructions"] = svm_accuracy(
            *real_images(DIGITS, TRAINING_SPLIT[split]), pixels, labels
        )
    if is_classifier_of(extractor, embedded) and split == "test":
        record["classifier_accuracy_on_reconstructions"] = accuracy(extractor, pixels, labels)
    return record


def samples_and_labels(images: Samples, embedded: EmbeddedSet) -> tuple[Tensor, Tensor] | None:
    """Returns samples (n, 3, H, W) in [0, 1] and their intended classes (n,).

    Returns None if the classes are unknown, are not those of the set (with a warning), or if there is only one, from
    which an SVM cannot learn.
    """
    names = list(embedded.class_names)
    labels = images.labels(names)
    if unknown := sorted(set(labels or ()) - set(range(len(names)))):
        warn(
            f"the samples have the label {unknown[0]}, but {embedded.name} have labels 0 to {len(names) - 1}: class "
            f"accuracy is not measured"
        )
        return None
    if labels is None or len(set(labels)) < 2:
        return None
    return torch.cat([*SourceImages(images).batches(0, len(images))]), torch.tensor(labels)


def is_classifier_of(extractor: nn.Module, embedded: EmbeddedSet) -> TypeGuard[EmbeddedClassifier]:
    """Returns whether the extractor is a classifier of the embedded set."""
    return isinstance(extractor, EmbeddedClassifier) and extractor.embedded is embedded


def accuracy(classifier: EmbeddedClassifier, pixels: Tensor, labels: Tensor) -> float:
    return float((classifier.classify(pixels.to(device_of(classifier))).cpu() == labels).float().mean())


def real_images(embedded: EmbeddedSet, split: Split) -> tuple[Tensor, Tensor]:
    """Returns images (n, 3, H, W) in [0, 1] and labels (n,)."""
    images, labels = embedded.load(split)
    return (images + 1) / 2, labels
