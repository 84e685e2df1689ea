"""All scores of an image set, from the same features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.devices import device_of, objects_from_ranks, rank_and_world_size
from lightning_mvar.metrics.frechet import BLOCK_ROWS, FeatureStatistics, frechet_distance, local_sums
from lightning_mvar.metrics.inception_score import InceptionScore
from lightning_mvar.metrics.intervals import (
    GROUPS,
    assign_groups,
    extrapolated_distance,
    jackknife_interval,
)
from lightning_mvar.metrics.kernel_distance import SUBSETS, kernel_distance, kernel_replicates
from lightning_mvar.metrics.mind import monge_distance
from lightning_mvar.metrics.precision_recall import enough_neighbors, precision_recall, precision_recall_without
from lightning_mvar.metrics.summary import Features, Summary, num_features
from lightning_mvar.metrics.vendi import VendiScore

SPLITS = 10  # splits of the inception score, as published
MAX_SAMPLE_FEATURES = 50_000  # samples whose features are compared with real ones, as in the published protocol


class Scores:
    """Accumulates images and scores them over all ranks.

    The inception score requires an extractor with `logits`, features (b, f) -> (b, classes); sFID requires spatial
    features of both extractor and reference; KID, MIND, precision, recall, density and coverage require a reference
    with features.

    Args:
        extractor: prepared, on the device to compute on.
        reference: summary of the real images.
        num_samples: images in the set, over all ranks.
        neighbors: k of precision and recall; 0 to skip them, density and coverage, which take the longest.
        keep_features: whether `intervals` or `extrapolated` will be called.
        keep_spatial: whether `intervals` will be called and should include sFID, if available.
    """

    def __init__(
        self,
        extractor: nn.Module,
        reference: Summary,
        num_samples: int,
        neighbors: int = 3,
        keep_features: bool = False,
        keep_spatial: bool = False,
    ) -> None:
        self.extractor, self.reference, self.neighbors = extractor, reference, neighbors
        keeps = keep_features or reference.features is not None
        max_features, keep_spatial = MAX_SAMPLE_FEATURES if keeps else 0, keep_spatial and reference.spatial is not None
        self.features = Features(extractor, num_samples, max_features, keep_spatial)
        self.vendi = VendiScore(num_features(extractor)).to(device_of(extractor))
        self.inception = self.inception_score(num_samples) if getattr(extractor, "logits", None) else None
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
            scores["mind"] = monge_distance(features, generated.features)
            if self.neighbors and enough_neighbors(features, generated.features, self.neighbors):
                scores |= precision_recall(features, generated.features, self.neighbors)
        return scores

    @torch.no_grad()
    def intervals(
        self, scores: dict[str, float], level: float, labels: list[int] | None = None
    ) -> dict[str, tuple[float, float]]:
        """Returns the confidence interval of each score over the samples; see `metrics.intervals`.

        Uses up to 50,000 samples. All ranks must call this. They share the work, except that of KID and the scores by
        neighbors, whose replicates come from one pass over all pairs.

        Args:
            scores: the result of `compute`.
            level: confidence level, such as 0.95.
            labels: class of each sample in the order of the set, if known.
        """
        features, real, noise = self.kept_features(), self.reference.features, {}
        if labels is not None:
            labels = torch.tensor(labels)[self.features.in_bank].tolist()
        groups = assign_groups(len(features), labels).to(features.device)
        replicates = self.replicates(features, groups)
        if real is not None:
            real = real.to(features.device)
            noise["kid"] = scores["kid_std"] ** 2 / SUBSETS
            for replicate, value in zip(replicates, kernel_replicates(real, features, groups), strict=True):
                replicate["kid"] = value
        if real is not None and "precision" in scores:
            neighbor_scores = precision_recall_without(real, features, groups, range(GROUPS), self.neighbors)
            replicates = [a | b for a, b in zip(replicates, neighbor_scores, strict=True)]
        share = len(features) / self.num_samples
        return {
            name: jackknife_interval(scores[name], [r[name] for r in replicates], level, share, noise.get(name, 0.0))
            for name in scores
            if name in replicates[0]
        }

    def replicates(self, features: Tensor, groups: Tensor) -> list[dict[str, float]]:
        """Returns `fid`, `sfid`, `is`, `vendi` and `mind` of the kept samples with each group left out in turn.

        Args:
            features: features (n, f) of the samples.
            groups: group (n,) of each sample, on the same device.
        """
        real, spatial_bank = self.reference, self.features.spatial_bank
        compared = {"fid": (real.statistics, features)}
        if real.spatial is not None and spatial_bank is not None:
            compared["sfid"] = real.spatial, spatial_bank.compute()
        sums = {name: local_sums(FeatureStatistics, all_features) for name, (_, all_features) in compared.items()}
        vendi, replicates = local_sums(VendiScore, features), []
        rank, world_size = rank_and_world_size()
        for group in tqdm(range(rank, GROUPS, world_size), "jackknife", leave=False, delay=5, disable=rank > 0):
            left_out = groups == group
            scores = {"vendi": vendi.without(local_sums(VendiScore, features[left_out])).compute()}
            for name, (statistics, all_features) in compared.items():
                rest = sums[name].without(local_sums(FeatureStatistics, all_features[left_out]))
                scores[name] = frechet_distance(statistics, rest.compute())
            if self.inception is not None:
                scores["is"] = self.inception_of(features, ~left_out)
            if real.features is not None:
                scores["mind"] = monge_distance(real.features.to(features.device), features[~left_out])
            replicates.append(scores)
        by_rank = objects_from_ranks(replicates)
        return [by_rank[group % world_size][group // world_size] for group in range(GROUPS)]

    def inception_of(self, features: Tensor, kept: Tensor) -> float:
        """Returns the inception score of some of n samples, without changing their splits, on this rank only.

        Args:
            features: features (n, f).
            kept: (n,) bool, which samples to score.
        """
        score = self.inception_score(len(features), sync_on_compute=False)
        for rows in kept.nonzero().flatten().split(BLOCK_ROWS):
            score.update(self.extractor.logits(features[rows]), rows)  # type: ignore[operator]
        return score.compute()[0]

    def extrapolated(self) -> float:
        """Returns the Frechet distance extrapolated to infinitely many samples; all ranks must call this."""
        return extrapolated_distance(self.reference.statistics, self.kept_features())

    def kept_features(self) -> Tensor:
        """Returns the features (n, f) of the samples of all ranks, at most 50,000."""
        features = self.features.compute().features
        assert features is not None, "needs keep_features"
        return features
