"""All scores of an image set, from the same features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mvar.devices import device_of
from lightning_mvar.metrics.frechet import frechet_distance
from lightning_mvar.metrics.inception_score import InceptionScore
from lightning_mvar.metrics.kernel_distance import kernel_distance
from lightning_mvar.metrics.mind import monge_distance
from lightning_mvar.metrics.precision_recall import enough_neighbours, precision_recall
from lightning_mvar.metrics.summary import Features, Summary, num_features
from lightning_mvar.metrics.vendi import VendiScore

SPLITS = 10  # splits of the inception score, as published
MAX_SAMPLE_FEATURES = 50_000  # samples whose features are compared with real ones, as in the published protocol


class Scores:
    """Accumulates images and scores them over all ranks.

    The inception score requires an extractor with `logits` (features (b, f) -> (b, classes)), sFID an extractor and a
    reference with spatial features, and scores other than distances of statistics a reference with features.

    Args:
        extractor: prepared, on the device to compute on.
        reference: summary of the real images.
        num_samples: images in the set, over all ranks.
        neighbours: k of precision and recall; 0 to skip them, density and coverage, which take the longest.
    """

    def __init__(self, extractor: nn.Module, reference: Summary, num_samples: int, neighbours: int = 3) -> None:
        self.extractor, self.reference, self.neighbours = extractor, reference, neighbours
        device = device_of(extractor)
        self.features = Features(extractor, num_samples, 0 if reference.features is None else MAX_SAMPLE_FEATURES)
        self.vendi = VendiScore(num_features(extractor)).to(device)
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
        self.vendi.update(features)
        if self.inception is not None:
            logits = self.extractor.logits(features)  # type: ignore[operator]
            self.inception.update(logits, indices.to(features.device))

    def compute(self) -> dict[str, float]:
        """Returns the scores that extractor and reference support; all ranks must call this.

        They are `fid`, `sfid`, `kid` with `kid_std`, `mind`, `is`, `vendi` and, if each set has enough images,
        `precision`, `recall`, `density` and `coverage`.
        """
        real, generated = self.reference, self.features.compute()
        scores = {"fid": frechet_distance(real.statistics, generated.statistics)}
        if real.spatial is not None and generated.spatial is not None:
            scores["sfid"] = frechet_distance(real.spatial, generated.spatial)
        if self.inception is not None:
            scores["is"] = self.inception.compute()[0]
        scores["vendi"] = self.vendi.compute()
        if real.features is not None and generated.features is not None:
            scores |= self.compare(real.features.to(generated.features.device), generated.features)
        return scores

    def compare(self, real: Tensor, generated: Tensor) -> dict[str, float]:
        """Returns the scores that compare features (n, f) of real images with those (m, f) of generated ones."""
        scores = {"mind": monge_distance(real, generated)}
        scores["kid"], scores["kid_std"] = kernel_distance(real, generated)
        if self.neighbours and enough_neighbours(real, generated, self.neighbours):
            scores |= precision_recall(real, generated, self.neighbours)
        return scores
