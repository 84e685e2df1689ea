"""Classifiers of the embedded images, as feature extractors."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lightning_mvar.data.builtin.base import EmbeddedSet
from lightning_mvar.errors import require_in
from lightning_mvar.metrics.classifiers.trained import TrainedClassifier

MAX_EPOCHS = 10_000


class EmbeddedClassifier(TrainedClassifier):
    """A classifier of an embedded set at its resolution, trained on its training split in seconds.

    A subclass names the set and defines its data augmentation.

    Args:
        weights: file of the trained weights; if it does not exist, the classifier is trained and written to it.
        epochs: passes over the training images.

    Raises:
        InputError: if `epochs` is not in [1, `MAX_EPOCHS`], or the file holds other weights.
    """

    embedded: EmbeddedSet

    def __init__(self, weights: str, epochs: int = 25) -> None:
        require_in(f"[1, {MAX_EPOCHS}]", f"{type(self).__name__}'s ", epochs=epochs)
        embedded = self.embedded
        path = Path(weights).expanduser()
        super().__init__(embedded.name, path, embedded.resolution, len(embedded.class_names), epochs)

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Returns images with margin (n, 3, H, W) float32 in [-1, 1], and labels."""
        return self.embedded.load_with_margin("train")
