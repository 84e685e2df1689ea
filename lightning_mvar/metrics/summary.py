"""Summaries of an image set's features in bounded memory: statistics of all, and a subset of the features."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.data.images.examples import spaced_evenly
from lightning_mvar.data.images.protocols import UNKNOWN_CROP
from lightning_mvar.devices import device_of, exact_float32
from lightning_mvar.errors import FOREIGN_MODULE_ERRORS, InputError
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.io.npz import NpzArray, array_names, read_text
from lightning_mvar.metrics.classifiers.trained import TrainedClassifier
from lightning_mvar.metrics.frechet import FeatureStatistics, Statistics
from lightning_mvar.metrics.image_sets import BATCH_SIZE, ImageSet, shard_range
from lightning_mvar.metrics.precision_recall import FeatureBank
from lightning_mvar.scales import Shape, format_shape

MAX_VALUE = 1e30  # of a statistic or feature; squares of larger numbers may overflow
SPATIAL = ("mu_s", "sigma_s")  # array names in published files
EXTRACTOR = "extractor_class"  # array name; "extractor" is the fingerprint of its weights
MAX_STORED_FEATURES = 100_000  # images whose features a file may hold; scores use at most 50,000


@dataclass
class Summary:
    """Statistics of all images, features (n, f) float32 of a subset (None if unknown), and the crop protocol."""

    statistics: Statistics
    spatial: Statistics | None = None
    features: Tensor | None = None
    crop: str = UNKNOWN_CROP

    def identity(self) -> dict[str, Any]:
        """Returns the crop and two numbers that identify the images: norm of the mean, and total variance."""
        return {
            "crop": self.crop,
            "reference_mean_norm": float(self.statistics.mu.norm()),
            "reference_variance": float(self.statistics.sigma.trace()),
        }

    def save(self, path: Path, extractor: nn.Module) -> None:
        """Writes an npz that `Summary.load` and other projects can read."""
        arrays: dict[str, Any] = {"mu": self.statistics.mu.numpy(), "sigma": self.statistics.sigma.numpy()}
        if self.spatial is not None:
            arrays |= dict(zip(SPATIAL, (self.spatial.mu.numpy(), self.spatial.sigma.numpy()), strict=True))
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        arrays |= {EXTRACTOR: np.array(describe_extractor(extractor)), "crop": np.array(self.crop)}
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays, extractor=np.array(fingerprint(extractor)))

    @classmethod
    def load(cls, path: Path, extractor: nn.Module) -> Summary:
        """Reads an npz that `save` or another project wrote with the same extractor.

        Raises:
            InputError: if the file is missing or damaged, or was written with another extractor.
        """
        names = array_names(path)
        if EXTRACTOR in names:  # not in published files
            saved, current = read_text(path, EXTRACTOR), describe_extractor(extractor)
            if saved != current:
                raise InputError(
                    f"{path} was computed with extractor {saved!r:.200}, not {current!r}: use the same extractor"
                )
        if "extractor" in names:
            saved, current = read_text(path, "extractor"), fingerprint(extractor)
            if saved != current:
                raise InputError(
                    f"{path} was computed with extractor weights {saved}, not {current}: use the same weights"
                )
        features = read_features(path, num_features(extractor)) if "features" in names else None
        return cls(
            read_statistics(path, ("mu", "sigma"), num_features(extractor), extractor),
            read_statistics(path, SPATIAL, num_spatial(extractor), extractor)
            if set(SPATIAL) <= set(names) and num_spatial(extractor)
            else None,
            None if features is None else torch.from_numpy(features),
            read_text(path, "crop") if "crop" in names else UNKNOWN_CROP,
        )


class Features:
    """Accumulates images into a `Summary`, over all ranks.

    Args:
        extractor: prepared, on the device to compute on.
        count: images in the set, over all ranks.
        max_features: maximum number of features to keep, from images spaced evenly over the set.
        keep_spatial: whether to keep the spatial features of these images too.
    """

    def __init__(self, extractor: nn.Module, count: int, max_features: int, keep_spatial: bool = False) -> None:
        self.extractor = extractor
        device, features, spatial = device_of(extractor), num_features(extractor), num_spatial(extractor)
        self.statistics = FeatureStatistics(features).to(device)
        self.spatial = FeatureStatistics(spatial).to(device) if spatial else None
        self.bank = FeatureBank(features).to(device) if max_features else None
        self.spatial_bank = FeatureBank(spatial).to(device) if spatial and keep_spatial else None
        self.in_bank = torch.zeros(count, dtype=torch.bool)
        self.in_bank[spaced_evenly(count, max_features)] = True

    @torch.no_grad()
    def update(self, images: Tensor, indices: Tensor) -> Tensor:
        """Adds images (b, 3, H, W) float32 in [0, 1] with their indices (b,) in the set; returns features (b, f)."""
        with exact_float32():
            if self.spatial is None:
                features = self.extractor(images)
            else:
                features, spatial = self.extractor.features_and_spatial(images)  # type: ignore[operator]
                self.spatial.update(spatial)
        self.statistics.update(features)
        kept = self.in_bank[indices.cpu()]
        if self.bank is not None:
            self.bank.update(features[kept.to(features.device)], indices[kept.to(indices.device)])
        if self.spatial_bank is not None:
            self.spatial_bank.update(spatial[kept.to(spatial.device)], indices[kept.to(indices.device)])
        return features

    def compute(self) -> Summary:
        """Returns the summary over all ranks, which must all call this."""
        return Summary(
            self.statistics.compute(),
            None if self.spatial is None else self.spatial.compute(),
            None if self.bank is None else self.bank.compute(),
        )


class ImageAccumulator(Protocol):
    """Interface of `Features` and `Scores`: accumulates images with their indices in the set."""

    extractor: nn.Module

    def update(self, images: Tensor, indices: Tensor) -> object: ...


def feed_shard(images: ImageSet, accumulator: ImageAccumulator, progress: str) -> None:
    """Feeds this rank's shard of an image set to an accumulator."""
    begin, end = shard_range(len(images))
    device = device_of(accumulator.extractor)
    batches = -(-(end - begin) // BATCH_SIZE)
    for batch in tqdm(images.batches(begin, end), progress, batches, leave=False, disable=begin > 0):
        accumulator.update(batch.to(device), torch.arange(begin, begin + len(batch)))
        begin += len(batch)


def prepare(extractor: nn.Module, device: torch.device) -> nn.Module:
    """Moves an extractor to a device, in eval mode without gradients, and trains it if necessary.

    Raises:
        InputError: if it is not an extractor.
    """
    num_features(extractor)
    if isinstance(extractor, TrainedClassifier):
        extractor.load_or_train()
    if not [*extractor.parameters(), *extractor.buffers()]:  # `device_of` needs a tensor
        extractor.register_buffer("device_mark", torch.empty(0), persistent=False)
    return extractor.eval().requires_grad_(False).to(device)


def try_extractor(extractor: nn.Module, shape: Shape) -> None:
    """Raises InputError unless a prepared extractor maps an image of `shape` to its features."""
    name, image = type(extractor).__name__, torch.zeros(1, 3, *shape, device=device_of(extractor))
    try:
        with torch.no_grad():
            features = extractor(image)
    except FOREIGN_MODULE_ERRORS as error:
        raise InputError(
            f"{name} cannot extract features: it raises {type(error).__name__} for an image of {format_shape(shape)}"
        ) from error
    expected, found = (1, num_features(extractor)), tuple(getattr(features, "shape", ()))
    if not isinstance(features, Tensor) or found != expected:
        raise InputError(f"{name} cannot extract features: for one image it returns shape {found}, not {expected}")


def describe_extractor(extractor: nn.Module) -> str:
    """Returns class path and arguments of an extractor, such as "package.Features(scale=2.0)".

    The weights alone do not identify it, because pooling has none. Arguments are included if they are plain values that
    the module stores under their names, except `weights`: that file may be moved, and its content is hashed instead.
    """
    kind = type(extractor)
    values = {name: getattr(extractor, name, None) for name in signature(kind).parameters if name != "weights"}
    plain = [f"{name}={value!r}" for name, value in values.items() if is_plain(value)]
    return f"{kind.__module__}.{kind.__qualname__}({', '.join(plain)})"


def extractor_metadata(extractor: nn.Module) -> dict[str, Any]:
    """Returns the properties of an extractor that scores depend on, and what its scores are comparable with."""
    scope = getattr(extractor, "comparable_with", None)
    return ({} if scope is None else {"comparable_with": scope}) | {
        "extractor": type(extractor).__name__,
        "extractor_class": describe_extractor(extractor),
        "extractor_weights": fingerprint(extractor),
        "resize": getattr(extractor, "resize", "none"),
        "num_features": num_features(extractor),
    }


def is_plain(value: Any) -> bool:
    """Returns whether a value is a number, a string, or a sequence of them."""
    return all(map(is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, int | float | str)


def num_features(extractor: nn.Module) -> int:
    """Returns the number of features of an extractor; raises InputError if it is not an extractor."""
    features = getattr(extractor, "num_features", None)
    if not isinstance(features, int):
        raise InputError(f"{type(extractor).__name__} is not a feature extractor: it has no int attribute num_features")
    return features


def num_spatial(extractor: nn.Module) -> int:
    """Returns the number of spatial features of an extractor; 0 if it has none."""
    return getattr(extractor, "num_spatial", 0)


def read_features(path: Path, expected: int) -> NDArray[Any]:
    """Reads the features (n, f) of an npz.

    Raises:
        InputError: if images do not have `expected` features, features are not finite, or there are too many images.
    """
    array = NpzArray(path, "features")
    if len(array.shape) != 2 or array.shape[1] != expected or len(array) > MAX_STORED_FEATURES:
        raise InputError(
            f"{path} has features {array.shape}, not (n, {expected}) of at most {MAX_STORED_FEATURES} images"
        )
    return read_finite(array, np.float32)


def read_statistics(path: Path, names: tuple[str, str], expected: int, extractor: nn.Module) -> Statistics:
    mu, sigma = (NpzArray(path, name) for name in names)
    if mu.shape != (expected,) or sigma.shape != (expected, expected):
        raise InputError(
            f"{path} has {names[0]} {mu.shape} and {names[1]} {sigma.shape}, but "
            f"{type(extractor).__name__} has {expected} features: the file was computed with another extractor"
        )
    statistics = Statistics(*(torch.from_numpy(read_finite(array, np.float64)) for array in (mu, sigma)))
    if not may_be_covariance(statistics.sigma):
        raise InputError(f"{path}: {names[1]} is not a covariance: it must be symmetric and positive semi-definite")
    return statistics


def may_be_covariance(sigma: Tensor) -> bool:
    """Returns whether a matrix is symmetric and |s_ij|^2 <= s_ii s_jj, up to rounding of float32."""
    variances = sigma.diagonal()
    tolerance = 1e-4 * variances.abs().max() + torch.finfo(sigma.dtype).tiny
    if (sigma - sigma.T).abs().max() > tolerance or (variances < -tolerance).any():
        return False
    deviations = variances.clamp(min=0).sqrt()
    return bool((sigma.abs() <= deviations[:, None] * deviations + tolerance).all())


def read_finite(array: NpzArray, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Reads an array whose shape has been checked; raises InputError if it does not hold finite numbers."""
    with np.errstate(over="ignore"):
        values = array.read().astype(dtype, copy=False) if array.dtype.kind in "fiu" else None
    if values is None or not (np.abs(values) <= MAX_VALUE).all():
        raise InputError(f"{array.path}: {array.name} must be finite numbers, got an array of {array.dtype}")
    return values
