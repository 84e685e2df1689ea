"""Scores of image sets against a reference, all computed from the same features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lightning_mvar.devices import warn
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.frechet import frechet_distance
from lightning_mvar.metrics.precision_recall import DENSITY_NEIGHBORS
from lightning_mvar.metrics.reference import Reference
from lightning_mvar.metrics.summary import Summary, num_features
from lightning_mvar.scales import Shape
from lightning_mvar.tokenizer.tokenizer import Tokenizer

FLOOR_ROUNDING = 1e-9  # rounding error of a distance, relative to the variances
FULL_NAMES = {
    "fid": "frechet_distance",
    "sfid": "spatial_frechet_distance",
    "kid": "kernel_distance",
    "kid_std": "kernel_distance_std",
    "mind": "mind",
    "is": "inception_score",
    "vendi": "vendi_score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}


class Evaluator:
    """Scores image sets of one size with one extractor; all ranks share the work.

    Args:
        extractor: prepared, on the device to compute on.
        shape: (height, width) of the images.
        cache: folder for reference statistics.
        tokenizer: decodes references that are token shards, on the device to decode on.
        num_workers: processes that decode image files.
    """

    def __init__(
        self, extractor: nn.Module, shape: Shape, cache: Path, tokenizer: Tokenizer | None, num_workers: int
    ) -> None:
        self.extractor, self.shape, self.cache = extractor, shape, cache
        self.tokenizer, self.num_workers = tokenizer, num_workers

    def summary(self, reference: Reference) -> Summary:
        """Returns the reference's statistics and features; warns if its images are too few for some scores."""
        summary = reference.summary(
            self.extractor, self.shape, self.cache, tokenizer=self.tokenizer, num_workers=self.num_workers
        )
        count, features = len(summary.features) if summary.features is not None else None, num_features(self.extractor)
        if count is not None and count <= features:
            scores = " and there is no precision or recall" if count <= DENSITY_NEIGHBORS else ""
            warn(f"{reference.name} has {count} images for {features} features: its covariance is singular{scores}")
        return summary

    def floor_scores(self, distance: float, real: Summary, floor: Reference) -> dict[str, Any]:
        """Returns the distance of other real images to the reference, and the samples' distance divided by it.

        There is no ratio if the floor's distance is 0 up to rounding, as with the images of the reference itself.
        """
        statistics = self.summary(floor).statistics
        floor_distance = frechet_distance(real.statistics, statistics)
        if floor_distance <= FLOOR_ROUNDING * float(real.statistics.sigma.trace() + statistics.sigma.trace()):
            warn(
                f"the floor {floor.name} is at distance {floor_distance:.1e} from the reference, zero up to rounding, "
                f"so no ratio is reported: pass other real images as --floor"
            )
            return {"floor_frechet_distance": floor_distance}
        return {"floor_frechet_distance": floor_distance, "frechet_distance_over_floor": distance / floor_distance}


def check_sample_count(count: int, extractor: nn.Module) -> None:
    """Warns if the samples are too few for a full-rank covariance.

    Raises:
        InputError: if they are too few for any score.
    """
    if count < 2:
        raise InputError(f"{count} samples are too few: a Frechet distance needs at least 2")
    if count <= num_features(extractor):
        warn(
            f"{count} samples for {num_features(extractor)} features: the covariance is singular and the "
            f"Frechet distance is biased upwards; compare it only with distances of the same number of samples "
            f"(published ones use 50,000)"
        )
