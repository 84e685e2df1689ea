"""Judges of generated digits: a small classifier as feature extractor, and a support vector machine."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_mvar.data.builtin.digits import DIGITS
from lightning_mvar.metrics.embedded import EmbeddedClassifier

SCAN_SIDE = 8  # the scans' own resolution, on which the support vector machine judges


class DigitsClassifier(EmbeddedClassifier):
    """Reads digits, trained on them shifted by up to two pixels; see `EmbeddedClassifier`."""

    embedded = DIGITS

    def vary(self, wide: Tensor) -> Tensor:
        return DIGITS.centre(wide).roll(torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))


def as_scans(images: Tensor) -> NDArray[np.float32]:
    """(n, 3, 32, 32) in [0, 1] -> (n, 64): grey, averaged to the scans' 8 x 8."""
    return F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), SCAN_SIDE).flatten(1).numpy()


def svm_accuracy(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> float:
    """Train a support vector machine (radial basis) on some images in [0, 1], score it on others, as 8 x 8 scans."""
    from sklearn.svm import SVC

    return float(SVC(C=10).fit(as_scans(images), labels.numpy()).score(as_scans(test_images), test_labels.numpy()))
