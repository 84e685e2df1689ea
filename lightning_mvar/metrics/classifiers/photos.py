"""Classifiers of photo patches, by the photo they were cropped from."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mvar.data.builtin.photos import MARGIN, PHOTOS, PHOTOS64
from lightning_mvar.metrics.classifiers.embedded import EmbeddedClassifier


class PhotosClassifier(EmbeddedClassifier):
    """Classifies patches by photo; augmented by random crops and flips. See `EmbeddedClassifier`.

    Its accuracy is 91 % on the test patches, which come from other regions of the photos.
    """

    embedded = PHOTOS

    def augment(self, images: Tensor) -> Tensor:
        top, left = torch.randint(2 * MARGIN + 1, (2,)).tolist()
        side = self.embedded.resolution
        cropped = images[:, :, top : top + side, left : left + side]
        return cropped.flip(3) if torch.rand(()) < 0.5 else cropped


class Photos64Classifier(PhotosClassifier):
    """Classifies patches of 64 x 64 pixels; its accuracy is 93 % on the test patches."""

    embedded = PHOTOS64
