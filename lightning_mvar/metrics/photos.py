"""The judge of generated photo patches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mvar.data.builtin.photos import MARGIN, PHOTOS, PHOTOS64
from lightning_mvar.metrics.embedded import EmbeddedClassifier


class PhotosClassifier(EmbeddedClassifier):
    """Tells which photo a patch is of, trained on them shifted and mirrored; see `EmbeddedClassifier`.

    It tells 91 % of the test patches, which lie in other parts of the photos.
    """

    embedded = PHOTOS

    def vary(self, wide: Tensor) -> Tensor:
        top, left = torch.randint(2 * MARGIN + 1, (2,)).tolist()
        side = self.embedded.resolution
        cropped = wide[:, :, top : top + side, left : left + side]
        return cropped.flip(3) if torch.rand(()) < 0.5 else cropped


class Photos64Classifier(PhotosClassifier):
    """The same for patches of 64 x 64 pixels; it tells 93 % of the test patches."""

    embedded = PHOTOS64
