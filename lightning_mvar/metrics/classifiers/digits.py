"""Classifiers of digits: a small CNN that is also the feature extractor, and a support vector machine."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_mvar.data.builtin.digits import DIGITS
from lightning_mvar.metrics.classifiers.embedded import EmbeddedClassifier

SCAN_SIDE = 8  # original resolution of the scans, the input of the support vector machine


class DigitsClassifier(EmbeddedClassifier):
    """Classifies digits; augmented by shifts of up to two pixels. See `EmbeddedClassifier`."""

    embedded = DIGITS

    def augment(self, images: Tensor) -> Tensor:
        return DIGITS.center(images).roll(torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))


def to_scans(images: Tensor) -> NDArray[np.float32]:
    """Converts images (n, 3, 32, 32) in [0, 1] to gray 8 x 8 scans (n, 64) by averaging."""
    return F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), SCAN_SIDE).flatten(1).numpy()


def svm_accuracy(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> float:
    """Returns the test accuracy of an RBF support vector machine; images in [0, 1], downscaled to 8 x 8 scans."""
    from sklearn.svm import SVC

    return float(SVC(C=10).fit(to_scans(images), labels.numpy()).score(to_scans(test_images), test_labels.numpy()))
