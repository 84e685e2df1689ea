"""Frechet distance between the features of two sets of images (FID, arXiv 1706.08500).

    |mu_1 - mu_2|^2 + tr(sigma_1) + tr(sigma_2) - 2 tr((sigma_1 sigma_2)^(1/2))

The value depends on the extractor: only InceptionV3's, with the published preprocessing, is comparable to published
FID. The last trace is computed as the nuclear norm of sigma_1^(1/2) sigma_2^(1/2), which keeps a set against itself at
0 to rounding, also where a covariance is singular. Statistics are cached as npz with the keys `mu` and `sigma` that
published files have.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm import tqdm

from lightning_mvar.data.images import ImageSource, collate
from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path
from lightning_mvar.fingerprint import fingerprint

BATCH_SIZE = 64


@dataclass
class Statistics:
    """Mean (f,) and covariance (f, f) of n feature vectors, float64 on the CPU."""

    mu: Tensor
    sigma: Tensor
    n: int

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            np.savez(temporary, mu=self.mu.numpy(), sigma=self.sigma.numpy(), n=self.n)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Raises InputError if the file is damaged."""
        try:
            with np.load(path, allow_pickle=False) as values:
                mu, sigma = (torch.from_numpy(values[key]).double() for key in ("mu", "sigma"))
                return cls(mu, sigma, int(values["n"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}); remove it, it is computed anew") from error


class FeatureStatistics(Metric):
    """Accumulates features (b, f) into `Statistics`, exactly and over all ranks: the float64 sums add up."""

    full_state_update = False

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.total: Tensor
        self.outer: Tensor
        self.n: Tensor
        self.add_state("total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, features: Tensor) -> None:
        features = features.double()
        self.total += features.sum(dim=0)
        self.outer += features.T @ features
        self.n += len(features)

    def compute(self) -> Statistics:
        """Needs at least two feature vectors."""
        n = int(self.n)
        mu = self.total / n
        sigma = (self.outer - n * torch.outer(mu, mu)) / (n - 1)
        return Statistics(mu.cpu(), sigma.cpu(), n)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The distance between two sets of features of the same extractor.

    Raises:
        InputError: if the numbers of features differ.
    """
    if a.mu.shape != b.mu.shape:
        raise InputError(f"statistics of {len(a.mu)} and of {len(b.mu)} features: not of the same extractor")
    cross = torch.linalg.matrix_norm(square_root(a.sigma) @ square_root(b.sigma), ord="nuc")
    return float((a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * cross)


def square_root(sigma: Tensor) -> Tensor:
    """Of a positive semi-definite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(sigma)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def prepare_extractor(extractor: nn.Module) -> int:
    """Put an extractor in eval mode; its `num_features`, or InputError where it has none."""
    features = getattr(extractor, "num_features", None)
    if not isinstance(features, int):
        raise InputError(f"{type(extractor).__name__} is no feature extractor: it has no int attribute num_features")
    extractor.eval().requires_grad_(False)
    return features


@torch.inference_mode()
def image_statistics(extractor: nn.Module, images: Tensor, progress: str) -> Statistics:
    """Statistics of images (n, 3, H, W) float32 in [0, 1], on the extractor's device; InputError unless n >= 2."""
    if len(images) < 2:
        raise InputError(f"a covariance needs at least 2 images, got {len(images)}")
    metric = FeatureStatistics(prepare_extractor(extractor))
    device = next((parameter.device for parameter in extractor.parameters()), torch.device("cpu"))
    for batch in tqdm(images.split(BATCH_SIZE), desc=progress, leave=False):
        metric.update(extractor(batch.to(device)).cpu())
    return metric.compute()


def reference_statistics(extractor: nn.Module, source: str, images: ImageSource, cache: Path) -> Statistics:
    """Statistics of all images of a source, computed once for each extractor and kept in the folder `cache`."""
    prepare_extractor(extractor)
    identity = f"{source} {images.identity} {images.resolution} {fingerprint(extractor)}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    path = cache / f"{type(extractor).__name__}-{key}.npz"
    if not path.is_file():
        image_statistics(extractor, stack_images(images), f"features of {source}").save(path)
    return Statistics.load(path)


def stack_images(images: ImageSource) -> Tensor:
    """Every image of a source, (n, 3, H, W) float32 in [0, 1]."""
    return (collate([images[i] for i in range(len(images))]).images + 1) / 2
