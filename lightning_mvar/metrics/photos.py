"""The judge of generated photo patches."""

from lightning_mvar.data.photos import PHOTOS
from lightning_mvar.metrics.embedded import EmbeddedClassifier


class PhotosClassifier(EmbeddedClassifier):
    """Tells which photo a patch is of; see `EmbeddedClassifier`."""

    embedded = PHOTOS
