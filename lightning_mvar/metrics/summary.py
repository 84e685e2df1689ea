"""What is kept of the features of a set of images, however many there are: statistics, and some of the features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.devices import device_of
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.io.npz import names_in, read_npz
from lightning_mvar.metrics.frechet import FeatureStatistics, Statistics
from lightning_mvar.metrics.image_sets import BATCH_SIZE, ImageSet, share
from lightning_mvar.metrics.precision_recall import FeatureBank

SPATIAL = ("mu_s", "sigma_s")  # the published files' names


@dataclass
class Summary:
    """Statistics of all images, and features (n, f) float32 of some; None where unknown."""

    statistics: Statistics
    spatial: Statistics | None = None
    features: Tensor | None = None

    def save(self, path: Path, extractor: nn.Module) -> None:
        """Write an npz that `Summary.load` and programs of other projects read."""
        arrays: dict[str, Any] = {"mu": self.statistics.mu.numpy(), "sigma": self.statistics.sigma.numpy()}
        if self.spatial is not None:
            arrays |= dict(zip(SPATIAL, (self.spatial.mu.numpy(), self.spatial.sigma.numpy()), strict=True))
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays, extractor=np.array(fingerprint(extractor)))

    @classmethod
    def load(cls, path: Path, extractor: nn.Module) -> Summary:
        """Read what `save`, or another project, wrote with the same extractor.

        Raises:
            InputError: if the file is missing or damaged, or was made with another extractor.
        """
        names = names_in(path)
        if "extractor" in names:
            theirs, ours = str(read_npz(path, ["extractor"])["extractor"]), fingerprint(extractor)
            if theirs != ours:
                raise InputError(f"{path} was made with an extractor of weights {theirs}, not {ours}")
        features = numbers_in(path, "features") if "features" in names else None
        if features is not None and (features.ndim != 2 or features.shape[1] != num_features(extractor)):
            raise InputError(f"{path} has features {features.shape}, not (n, {num_features(extractor)})")
        return cls(
            read_statistics(path, ("mu", "sigma"), num_features(extractor), extractor),
            read_statistics(path, SPATIAL, num_spatial(extractor), extractor)
            if set(SPATIAL) <= set(names) and num_spatial(extractor)
            else None,
            None if features is None else torch.from_numpy(features),
        )


class Features:
    """Accumulates images into a `Summary`, over all ranks.

    Args:
        extractor: prepared, on the device to compute on.
        count: images in the set, over all ranks.
        kept: features to keep at most, of images spread evenly over the set.
    """

    def __init__(self, extractor: nn.Module, count: int, kept: int) -> None:
        self.extractor = extractor
        device, features, spatial = device_of(extractor), num_features(extractor), num_spatial(extractor)
        self.statistics = FeatureStatistics(features).to(device)
        self.spatial = FeatureStatistics(spatial).to(device) if spatial else None
        self.bank = FeatureBank(features).to(device) if kept else None
        self.is_kept = torch.zeros(count, dtype=torch.bool)
        if kept:
            self.is_kept[np.linspace(0, count - 1, min(count, kept)).round().astype(int)] = True

    @torch.no_grad()
    def update(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (b, 3, H, W) float32 in [0, 1] with their numbers (b,) in the set -> their features (b, f)."""
        if self.spatial is None:
            features = self.extractor(images)
        else:
            features, spatial = self.extractor.features_and_spatial(images)  # type: ignore[operator]
            self.spatial.update(spatial)
        self.statistics.update(features)
        if self.bank is not None:
            self.bank.update(features[self.is_kept[numbers.cpu()].to(features.device)])
        return features

    def compute(self) -> Summary:
        """Of the images of all ranks, which must all call this."""
        return Summary(
            self.statistics.compute(),
            None if self.spatial is None else self.spatial.compute(),
            None if self.bank is None else self.bank.compute(),
        )


class TakesImages(Protocol):
    """What images with their numbers can be handed to: `Features`, `Scores`."""

    extractor: nn.Module

    def update(self, images: Tensor, numbers: Tensor) -> object: ...


def hand_over(images: ImageSet, to: TakesImages, progress: str) -> None:
    """Hand this rank's share of a set to `to`."""
    begin, end = share(len(images))
    device = device_of(to.extractor)
    batches = -(-(end - begin) // BATCH_SIZE)
    for batch in tqdm(images.batches(begin, end), progress, batches, leave=False, disable=begin > 0):
        to.update(batch.to(device), torch.arange(begin, begin + len(batch)))
        begin += len(batch)


def prepare(extractor: nn.Module, device: torch.device) -> nn.Module:
    """In eval mode, without gradients, on a device; InputError where it is no extractor."""
    num_features(extractor)
    return extractor.eval().requires_grad_(False).to(device)


def num_features(extractor: nn.Module) -> int:
    """Of an extractor.

    Raises:
        InputError: where it is none.
    """
    features = getattr(extractor, "num_features", None)
    if not isinstance(features, int):
        raise InputError(f"{type(extractor).__name__} is no feature extractor: it has no int attribute num_features")
    return features


def num_spatial(extractor: nn.Module) -> int:
    """Spatial features of an extractor, 0 where it gives none."""
    return getattr(extractor, "num_spatial", 0)


def numbers_in(path: Path, name: str) -> NDArray[Any]:
    """An array of finite numbers.

    Raises:
        InputError: if it is anything else.
    """
    array = read_npz(path, [name])[name]
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise InputError(f"{path}: {name} must be finite numbers, got an array of {array.dtype}")
    return array


def read_statistics(path: Path, names: tuple[str, str], expected: int, extractor: nn.Module) -> Statistics:
    mu, sigma = (torch.from_numpy(numbers_in(path, name)).double() for name in names)
    if mu.shape != (expected,) or sigma.shape != (expected, expected):
        raise InputError(
            f"{path} has {names[0]} {tuple(mu.shape)} and {names[1]} {tuple(sigma.shape)}, but "
            f"{type(extractor).__name__} makes {expected} features: it was made with another extractor"
        )
    return Statistics(mu, sigma)
