"""All scores of a set of images, on the same features: Frechet distances, inception score, precision and recall."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mvar.devices import device_of
from lightning_mvar.metrics.frechet import frechet_distance
from lightning_mvar.metrics.inception_score import InceptionScore
from lightning_mvar.metrics.precision_recall import precision_recall
from lightning_mvar.metrics.summary import Features, Summary, num_features

SPLITS = 10  # of the inception score, as published
MAX_FEATURES = 50_000  # sampled images that precision and recall are taken of, as in the published protocol


class Scores:
    """Accumulates images, and scores them over all ranks.

    The inception score takes an extractor that has `logits` (features (b, f) -> (b, classes)); precision and recall
    take features of real images; sFID an extractor and a reference that have spatial features.

    Args:
        extractor: prepared, on the device to compute on.
        reference: the real images.
        num_samples: images in the set, over all ranks.
        neighbours: k of precision and recall; 0 for neither.
    """

    def __init__(self, extractor: nn.Module, reference: Summary, num_samples: int, neighbours: int = 3) -> None:
        self.extractor, self.reference, self.neighbours = extractor, reference, neighbours
        device = device_of(extractor)
        compares_features = neighbours and reference.features is not None
        self.features = Features(extractor, num_samples, MAX_FEATURES if compares_features else 0)
        self.inception: InceptionScore | None = None
        if hasattr(extractor, "logits"):
            empty = torch.zeros(1, num_features(extractor), device=device)
            classes = extractor.logits(empty).shape[1]  # type: ignore[operator]
            self.inception = InceptionScore(classes, num_samples, min(SPLITS, num_samples)).to(device)

    @torch.no_grad()
    def update(self, images: Tensor, numbers: Tensor) -> None:
        """Images (b, 3, H, W) float32 in [0, 1] with their numbers (b,) in the set; b may be 0, so that ranks agree."""
        if not len(images):
            return
        features = self.features.update(images, numbers)
        if self.inception is not None:
            logits = self.extractor.logits(features)  # type: ignore[operator]
            self.inception.update(logits, numbers.to(features.device))

    def compute(self) -> dict[str, float]:
        """`fid`, and where they can be computed `sfid`, `is`, `precision` and `recall`; all ranks must call this.

        Raises:
            InputError: if there are no more images than neighbours.
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
