"""A classifier of emoji by their class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.data.builtin.emoji import EMOJI64
from lightning_mvar.metrics.classifiers.embedded import EmbeddedClassifier

MAX_SHIFT = 4  # of an augmented image, in pixels


class Emoji64Classifier(EmbeddedClassifier):
    """Classifies emoji by class; augmented by shifts over white. See `EmbeddedClassifier`."""

    embedded = EMOJI64

    def augment(self, images: Tensor) -> Tensor:
        top, left = torch.randint(2 * MAX_SHIFT + 1, (2,)).tolist()
        padded = F.pad(images, (MAX_SHIFT,) * 4, value=1.0)
        return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]
