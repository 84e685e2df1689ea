"""Frechet distances, inception score, precision and recall of an image set, from the same features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mvar.devices import device_of
from lightning_mvar.metrics.frechet import frechet_distance
from lightning_mvar.metrics.inception_score import InceptionScore
from lightning_mvar.metrics.precision_recall import precision_recall
from lightning_mvar.metrics.summary import Features, Summary, num_features

SPLITS = 10  # splits of the inception score, as published
MAX_SAMPLE_FEATURES = 50_000  # samples used for precision and recall, as in the published protocol


class Scores:
    """Accumulates images and scores them over all ranks.

    The inception score requires an extractor with `logits` (features (b, f) -> (b, classes)), precision and recall a
    reference with features, and sFID an extractor and a reference with spatial features.

    Args:
        extractor: prepared, on the device to compute on.
        reference: summary of the real images.
        num_samples: images in the set, over all ranks.
        neighbours: k of precision and recall; 0 to skip them.
    """

    def __init__(self, extractor: nn.Module, reference: Summary, num_samples: int, neighbours: int = 3) -> None:
        self.extractor, self.reference, self.neighbours = extractor, reference, neighbours
        device = device_of(extractor)
        needs_features = neighbours and reference.features is not None
        self.features = Features(extractor, num_samples, MAX_SAMPLE_FEATURES if needs_features else 0)
        self.inception: InceptionScore | None = None
        if hasattr(extractor, "logits"):
            zeros = torch.zeros(1, num_features(extractor), device=device)
            classes = extractor.logits(zeros).shape[1]  # type: ignore[operator]
            self.inception = InceptionScore(classes, num_samples, min(SPLITS, num_samples)).to(device)

    @torch.no_grad()
    def update(self, images: Tensor, indices: Tensor) -> None:
        """Adds images (b, 3, H, W) float32 in [0, 1] with their indices (b,) in the set; b may be 0."""
        if not len(images):
            return
        features = self.features.update(images, indices)
        if self.inception is not None:
            logits = self.extractor.logits(features)  # type: ignore[operator]
            self.inception.update(logits, indices.to(features.device))

    def compute(self) -> dict[str, float]:
        """Returns `fid` and, if available, `sfid`, `is`, `precision` and `recall`; all ranks must call this.

        Raises:
            InputError: if there are not more images than neighbours.
        """
        real, generated = self.reference, self.features.compute()
        scores = {"fid": frechet_distance(real.statistics, generated.statistics)}
        if real.spatial is not None and generated.spatial is not None:
            scores["sfid"] = frechet_distance(real.spatial, generated.spatial)
        if self.inception is not None:
            scores["is"] = self.inception.compute()[0]
        if real.features is not None and generated.features is not None:
            features = real.features.to(generated.features.device)
            scores["precision"], scores["recall"] = precision_recall(features, generated.features, self.neighbours)
        return scores
