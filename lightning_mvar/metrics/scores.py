"""All scores of a set of images, on the same features: Frechet distance, inception score, precision and recall."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mvar.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_mvar.metrics.inception_score import InceptionScore
from lightning_mvar.metrics.precision_recall import FeatureBank, precision_recall
from lightning_mvar.metrics.reference import Reference, device_of, num_features

SPLITS = 10  # of the inception score, as published


class Scores:
    """Accumulates images, and scores them over all ranks.

    The inception score takes an extractor that has `logits` (features (b, f) -> (b, classes)); precision and recall
    take features of real images.

    Args:
        extractor: prepared, on the device to compute on.
        reference: the real images.
        num_samples: images in the set, over all ranks.
        neighbours: k of precision and recall; 0 for neither.
    """

    def __init__(self, extractor: nn.Module, reference: Reference, num_samples: int, neighbours: int = 3) -> None:
        self.extractor, self.reference, self.neighbours = extractor, reference, neighbours
        device, features = device_of(extractor), num_features(extractor)
        self.statistics = FeatureStatistics(features).to(device)
        self.inception: InceptionScore | None = None
        if hasattr(extractor, "logits"):
            classes = extractor.logits(torch.zeros(1, features, device=device)).shape[1]  # type: ignore[operator]
            self.inception = InceptionScore(classes, num_samples, min(SPLITS, num_samples)).to(device)
        self.bank: FeatureBank | None = None
        if neighbours and reference.features is not None:
            self.bank = FeatureBank(features).to(device)

    @torch.no_grad()
    def update(self, images: Tensor, numbers: Tensor) -> None:
        """Images (b, 3, H, W) float32 in [0, 1] with their numbers (b,) in the set; b may be 0, so that ranks agree."""
        if not len(images):
            return
        features = self.extractor(images)
        self.statistics.update(features)
        if self.inception is not None:
            logits = self.extractor.logits(features)  # type: ignore[operator]
            self.inception.update(logits, numbers.to(features.device))
        if self.bank is not None:
            self.bank.update(features)

    def compute(self) -> dict[str, float]:
        """`fid`, and where they can be computed `is`, `precision` and `recall`; all ranks must call this.

        Raises:
            InputError: if there are no more images than neighbours.
        """
        scores = {"fid": frechet_distance(self.reference.statistics, self.statistics.compute())}
        if self.inception is not None:
            scores["is"] = self.inception.compute()[0]
        if self.bank is not None and self.reference.features is not None:
            generated = self.bank.compute()
            real = self.reference.features.to(generated.device)
            scores["precision"], scores["recall"] = precision_recall(real, generated, self.neighbours)
        return scores


def prepare(extractor: nn.Module, device: torch.device) -> nn.Module:
    """In eval mode, without gradients, on a device; InputError where it is no extractor."""
    num_features(extractor)
    return extractor.eval().requires_grad_(False).to(device)
