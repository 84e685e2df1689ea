"""A feature extractor for any images that needs no published weights."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.data.images.examples import OnCorrupt, decoded_batches, spaced_evenly
from lightning_mvar.data.images.protocols import MARGIN
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.classifiers.trained import BATCH_SIZE, TrainedClassifier

SIDE, SHIFT = 64, 4  # side of the network's input and largest shift in training, in pixels
MAX_IMAGES = 10_000  # training images, spread evenly over the source
STEPS = 1000
QUARTER_TURNS = 4  # rotations to tell apart, for images of one class


class ImageClassifier(TrainedClassifier):
    """A classifier of your own images by their classes, trained on 64 x 64 pixels in about a minute.

    Images of any size are resized to 64 x 64, so finer details do not count. In training, images are shifted but not
    mirrored: a mirrored letter or logo is an error that the features should show.

    Images of a single class are classified by the number of quarter turns that they are rotated by (RotNet, arXiv
    1803.07728). There are no `logits` then, because an inception score over rotations means nothing.

    Args:
        images: training images, a source as for `lightning-mvar tokenize`; at most 10,000 of them are read.
        labels: label file or columns, if the images are not sorted by class.
        margin: ratio of the resized shorter side to the center crop, as in `lightning-mvar tokenize`.
        cache: folder for the weights; their file is named with a hash of the settings and of the paths, sizes and
            modification times of the images.
        on_corrupt: `raise` an error for an image that cannot be decoded, or `skip` it with a warning.

    Raises:
        InputError: if the source does not exist.
    """

    resize = f"bilinear with antialiasing, to {SIDE} x {SIDE}"

    def __init__(
        self,
        images: str,
        labels: str | None = None,
        cache: str = "outputs/statistics",
        margin: float = MARGIN,
        on_corrupt: OnCorrupt = "raise",
    ) -> None:
        self.source = open_images(images, SIDE, on_corrupt, labels, margin=margin)
        classes, count = len(self.source.class_names), min(len(self.source), MAX_IMAGES)
        if classes == 1:
            classes, count = QUARTER_TURNS, QUARTER_TURNS * count
        identity = (
            f"{self.source.identity} {self.source.listing} {self.source.crop} {SIDE} {SHIFT} {MAX_IMAGES} {STEPS}"
        )
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        path = Path(cache).expanduser() / f"image_classifier-{digest}.safetensors"
        super().__init__(images, path, SIDE, classes, epochs=math.ceil(STEPS / math.ceil(count / BATCH_SIZE)))
        if len(self.source.class_names) == 1:
            self.logits = None  # type: ignore[assignment, method-assign]

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Returns center crops (n, 3, 64, 64) uint8 and labels; for one class, rotated crops and numbers of turns."""
        count = min(len(self.source), MAX_IMAGES)
        indices = spaced_evenly(len(self.source), count).tolist()
        batches = [
            (((batch.images + 1) * 127.5).round().to(torch.uint8), batch.labels)
            for batch in decoded_batches(self.source, BATCH_SIZE, 0, indices)
        ]
        if not batches:
            raise InputError(f"none of the {count} images of {self.name} can be decoded")
        images, labels = map(torch.cat, zip(*batches, strict=True))
        if len(self.source.class_names) > 1:
            return images, labels
        turned = [images.rot90(turns, (2, 3)) for turns in range(QUARTER_TURNS)]
        return torch.cat(turned), torch.arange(QUARTER_TURNS).repeat_interleave(len(images))

    def augment(self, images: Tensor) -> Tensor:
        top, left = torch.randint(2 * SHIFT + 1, (2,)).tolist()
        padded = F.pad(images / 127.5 - 1, (SHIFT,) * 4, mode="reflect")
        return padded[:, :, top : top + SIDE, left : left + SIDE]

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (b, 3, H, W) float32 in [0, 1] to features (b, 64)."""
        if images.shape[2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return super().forward(images)
