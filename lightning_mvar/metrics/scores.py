"""All scores of an image set, from the same features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.devices import device_of, is_first_rank
from lightning_mvar.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_mvar.metrics.inception_score import InceptionScore
from lightning_mvar.metrics.intervals import (
    BLOCK_ROWS,
    GROUPS,
    assign_groups,
    extrapolated_distance,
    jackknife_interval,
    kernel_replicates,
)
from lightning_mvar.metrics.kernel_distance import SUBSETS, kernel_distance
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
        keep_features: whether `intervals` and `extrapolated` will be called.
    """

    def __init__(
        self,
        extractor: nn.Module,
        reference: Summary,
        num_samples: int,
        neighbours: int = 3,
        keep_features: bool = False,
    ) -> None:
        self.extractor, self.reference, self.neighbours = extractor, reference, neighbours
        keeps = keep_features or reference.features is not None
        self.features = Features(extractor, num_samples, MAX_SAMPLE_FEATURES if keeps else 0)
        self.vendi = VendiScore(num_features(extractor)).to(device_of(extractor))
        self.inception = self.inception_score(num_samples) if hasattr(extractor, "logits") else None
        self.num_samples = num_samples

    def inception_score(self, num_samples: int, **options: Any) -> InceptionScore:
        device = device_of(self.extractor)
        zeros = torch.zeros(1, num_features(self.extractor), device=device)
        classes = self.extractor.logits(zeros).shape[1]  # type: ignore[operator]
        return InceptionScore(classes, num_samples, min(SPLITS, num_samples), **options).to(device)

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
            features = real.features.to(generated.features.device)
            scores["kid"], scores["kid_std"] = kernel_distance(features, generated.features)
            scores |= self.compare(features, generated.features)
        return scores

    def compare(self, real: Tensor, generated: Tensor) -> dict[str, float]:
        """Returns MIND and the scores of neighbours, given features (n, f) of real and (m, f) of generated images."""
        scores = {"mind": monge_distance(real, generated)}
        if self.neighbours and enough_neighbours(real, generated, self.neighbours):
            scores |= precision_recall(real, generated, self.neighbours)
        return scores

    @torch.no_grad()
    def intervals(
        self, scores: dict[str, float], level: float, labels: list[int] | None = None
    ) -> dict[str, tuple[float, float]]:
        """Returns the confidence interval of each score but sFID, over the samples; see `metrics.intervals`.

        They come from up to 50,000 samples; all ranks must call this.

        Args:
            scores: what `compute` returned.
            level: confidence level, such as 0.95.
            labels: class of each sample in the order of the set, if known.
        """
        features = self.kept_features()
        if labels is not None:
            labels = torch.tensor(labels)[self.features.in_bank].tolist()
        groups = assign_groups(len(features), labels)
        progress = tqdm(range(GROUPS), "jackknife", leave=False, delay=5, disable=not is_first_rank())
        replicates = [self.rescore(features, (groups != group).nonzero().flatten()) for group in progress]
        noise = {}
        if self.reference.features is not None:
            noise["kid"] = scores["kid_std"] ** 2 / SUBSETS
            real = self.reference.features.to(features.device)
            for replicate, value in zip(replicates, kernel_replicates(real, features, groups), strict=True):
                replicate["kid"] = value
        share = len(features) / self.num_samples
        return {
            name: jackknife_interval(scores[name], [r[name] for r in replicates], level, share, noise.get(name, 0.0))
            for name in scores
            if name in replicates[0]
        }

    def rescore(self, features: Tensor, kept: Tensor) -> dict[str, float]:
        """Returns the scores but sFID and KID of some samples; each rank computes them by itself.

        Args:
            features: features (n, f) of all samples.
            kept: indices (k,) int64 of the samples to score.
        """
        real, count = self.reference, features.shape[1]
        statistics = FeatureStatistics(count, sync_on_compute=False).to(features.device)
        vendi = VendiScore(count, sync_on_compute=False).to(features.device)
        inception = self.inception_score(len(features), sync_on_compute=False) if self.inception is not None else None
        for rows in kept.to(features.device).split(BLOCK_ROWS):
            statistics.update(features[rows])
            vendi.update(features[rows])
            if inception is not None:
                inception.update(self.extractor.logits(features[rows]), rows)  # type: ignore[operator]
        scores = {"fid": frechet_distance(real.statistics, statistics.compute()), "vendi": vendi.compute()}
        if inception is not None:
            scores["is"] = inception.compute()[0]
        if real.features is not None:
            scores |= self.compare(real.features.to(features.device), features[kept.to(features.device)])
        return scores

    def extrapolated(self) -> float:
        """Returns the Frechet distance extrapolated to infinitely many samples; all ranks must call this."""
        return extrapolated_distance(self.reference.statistics, self.kept_features())

    def kept_features(self) -> Tensor:
        """Returns the features (n, f) of the samples, or of 50,000 of them, over all ranks."""
        features = self.features.compute().features
        assert features is not None, "needs keep_features"
        return features
