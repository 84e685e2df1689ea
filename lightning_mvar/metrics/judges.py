"""Which classifier judges images of which embedded set."""

from __future__ import annotations

from lightning_mvar.data.images.sources import embedded_in
from lightning_mvar.metrics.digits import DigitsClassifier
from lightning_mvar.metrics.embedded import EmbeddedClassifier
from lightning_mvar.metrics.photos import Photos64Classifier, PhotosClassifier

CLASSIFIERS: dict[str, type[EmbeddedClassifier]] = {
    classifier.embedded.name: classifier for classifier in (DigitsClassifier, PhotosClassifier, Photos64Classifier)
}


def kept_classifier(source: str, folder: str) -> EmbeddedClassifier | None:
    """The classifier of the embedded set that `source` names, kept in a folder; None for a source of anything else."""
    embedded = embedded_in(source)
    return None if embedded is None else CLASSIFIERS[embedded[0].name].kept_in(folder)
