"""Frechet distance between the features of two sets of images (FID, arXiv 1706.08500), by torchmetrics.

The value depends on the extractor: only InceptionV3's, with the published preprocessing, is comparable to published
FID. Statistics of real images are cached as npz with the keys `mu` and `sigma` that published files have.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from lightning_mvar.data.images import ImageSource, collate
from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path
from lightning_mvar.fingerprint import fingerprint

BATCH_SIZE = 64


@dataclass
class Statistics:
    """Mean (f,) and covariance (f, f) of n feature vectors, float64."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    n: int

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            np.savez(temporary, mu=self.mu, sigma=self.sigma, n=self.n)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        with np.load(path) as values:
            return cls(values["mu"], values["sigma"], int(values["n"]))


def frechet_metric(extractor: nn.Module, real: Statistics | None = None) -> FrechetInceptionDistance:
    """A torchmetrics FID on `extractor`, its real side filled from `real`.

    States add up over ranks, so in a distributed run only one rank may fill in `real`.
    """
    if not hasattr(extractor, "num_features"):
        raise InputError(f"{type(extractor).__name__} is no feature extractor: it has no attribute num_features")
    metric = FrechetInceptionDistance(feature=extractor)
    if real is not None:
        if len(real.mu) != extractor.num_features:
            raise InputError(
                f"the reference has {len(real.mu)} features, {type(extractor).__name__} {extractor.num_features}"
            )
        fill(metric, "real", real)
    return metric


def fill(metric: FrechetInceptionDistance, side: str, statistics: Statistics) -> None:
    """Set the sums of one side ("real" or "fake") from its statistics."""
    mu, sigma, n = torch.from_numpy(statistics.mu), torch.from_numpy(statistics.sigma), statistics.n
    getattr(metric, f"{side}_features_sum").copy_(mu * n)
    getattr(metric, f"{side}_features_cov_sum").copy_(sigma * (n - 1) + n * torch.outer(mu, mu))
    getattr(metric, f"{side}_features_num_samples").fill_(n)


@torch.inference_mode()
def image_statistics(extractor: nn.Module, images: Tensor, progress: str = "features") -> Statistics:
    """Statistics of images (n, 3, H, W) float32 in [0, 1], n at least 2."""
    features = extract(extractor, images, progress).double().numpy()
    return Statistics(features.mean(axis=0), np.cov(features, rowvar=False), len(features))


@torch.inference_mode()
def extract(extractor: nn.Module, images: Tensor, progress: str) -> Tensor:
    """Features (n, f) of images (n, 3, H, W) in [0, 1], batch by batch, on the extractor's device."""
    device = next(extractor.parameters()).device
    batches = tqdm(images.split(BATCH_SIZE), desc=progress, leave=False)
    return torch.cat([extractor(batch.to(device)).cpu() for batch in batches])


def frechet_distance(extractor: nn.Module, real: Statistics, other: Statistics) -> float:
    """The distance between two sets of statistics of the same extractor."""
    metric = frechet_metric(extractor, real)
    fill(metric, "fake", other)
    return float(metric.compute())


def reference_statistics(extractor: nn.Module, source: str, images: ImageSource, cache: Path) -> Statistics:
    """Statistics of all images of a source, computed once for each extractor and kept in the folder `cache`."""
    identity = f"{type(extractor).__name__} {source} {images.resolution} {len(images)}"
    key = hashlib.sha256(f"{identity} {fingerprint(extractor)}".encode()).hexdigest()[:16]
    path = cache / f"{type(extractor).__name__}-{key}.npz"
    if not path.is_file():
        image_statistics(extractor, stack_images(images), f"features of {source}").save(path)
    return Statistics.load(path)


def stack_images(images: ImageSource) -> Tensor:
    """Every image of a source, (n, 3, H, W) float32 in [0, 1]."""
    return (collate([images[i] for i in range(len(images))]).images + 1) / 2
