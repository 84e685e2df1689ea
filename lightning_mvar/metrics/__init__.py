"""Scores of generated images, computed with any feature extractor.

An extractor is an `nn.Module` with an int attribute `num_features` that maps images (b, 3, H, W) float32 in [0, 1] to
features (b, num_features). If it has a method `logits`, features -> (b, classes), the inception score is computed too.
"""

from lightning_mvar.metrics.classifiers.digits import DigitsClassifier
from lightning_mvar.metrics.classifiers.emoji import Emoji64Classifier
from lightning_mvar.metrics.classifiers.own_images import ImageClassifier
from lightning_mvar.metrics.classifiers.photos import Photos64Classifier, PhotosClassifier
from lightning_mvar.metrics.extractors.dinov2 import DINOv2
from lightning_mvar.metrics.extractors.inception import InceptionV3
from lightning_mvar.metrics.extractors.timm_models import Timm
from lightning_mvar.metrics.extractors.transformers_models import Transformers

__all__ = [
    "DINOv2",
    "DigitsClassifier",
    "Emoji64Classifier",
    "ImageClassifier",
    "InceptionV3",
    "Photos64Classifier",
    "PhotosClassifier",
    "Timm",
    "Transformers",
]
