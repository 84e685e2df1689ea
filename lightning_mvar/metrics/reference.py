"""What real images look like to a feature extractor: measured once, by all ranks together, and kept in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.data.images import ImageSource, collate, open_images
from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path
from lightning_mvar.fingerprint import fingerprint
from lightning_mvar.metrics.frechet import FeatureStatistics, Statistics
from lightning_mvar.metrics.precision_recall import FeatureBank

BATCH_SIZE = 64
MAX_FEATURES = 10_000  # real images that precision and recall are taken against, as in the published protocol


@dataclass
class Reference:
    """Statistics of all real images, and features (n, f) float32 of at most `MAX_FEATURES`; None where unknown."""

    statistics: Statistics
    features: Tensor | None

    def save(self, path: Path) -> None:
        arrays = {"mu": self.statistics.mu.numpy(), "sigma": self.statistics.sigma.numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # numpy takes allow_pickle for an array


def load_reference(extractor: nn.Module, source: str, resolution: int, cache: Path) -> Reference:
    """The reference that `source` names, for images of `resolution` pixels a side.

    Measuring is divided among the ranks, which must all call this; what is measured is kept in the folder `cache`.

    Args:
        extractor: prepared, on the device to compute on.
        source: `digits:train` or `digits:test`, a folder of class folders, or an npz with `mu` and `sigma`, such as the
            published ADM / OpenAI files: the extractor must be the one that they were made with. With the images
            themselves in `arr_0` (uint8, N x H x W x 3), precision and recall can be computed too.
        resolution: side of the images of a folder, after resizing and cropping.
        cache: folder for what is measured.

    Raises:
        InputError: if the source does not exist, is damaged, or is not for this extractor.
    """
    if source.endswith(".npz"):
        return read_statistics(extractor, Path(source))
    images = open_images(source, resolution)
    identity = f"{source} {images.identity} {images.resolution} {fingerprint(extractor)}"
    path = cache / f"{type(extractor).__name__}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if told_by_first_rank(path.is_file()):
        return read_statistics(extractor, path)
    reference = measure(extractor, images, f"features of {source}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        reference.save(path)
    return reference


def told_by_first_rank(value: bool) -> bool:
    """The same on all ranks, though files may appear between their looks."""
    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


@torch.no_grad()
def measure(extractor: nn.Module, images: ImageSource, progress: str) -> Reference:
    """Reference of all images of a source, each rank computing its share.

    Raises:
        InputError: unless there are at least 2.
    """
    if len(images) < 2:
        raise InputError(f"a covariance needs at least 2 images, got {len(images)}")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    kept = set(np.linspace(0, len(images) - 1, min(len(images), MAX_FEATURES)).round().astype(int).tolist())
    device, features = device_of(extractor), num_features(extractor)
    statistics, bank = FeatureStatistics(features).to(device), FeatureBank(features).to(device)
    mine = list(range(rank, len(images), ranks))
    batches = [mine[begin : begin + BATCH_SIZE] for begin in range(0, len(mine), BATCH_SIZE)]
    for numbers in tqdm(batches, desc=progress, leave=False, disable=rank > 0):
        found = extractor(stack(images, numbers).to(device))
        statistics.update(found)
        bank.update(found[[number in kept for number in numbers]])
    return Reference(statistics.compute(), bank.compute().cpu())


def stack(images: ImageSource, numbers: list[int]) -> Tensor:
    """Some images of a source, (n, 3, H, W) float32 in [0, 1]."""
    return (collate([images[number] for number in numbers]).images + 1) / 2


def read_statistics(extractor: nn.Module, path: Path) -> Reference:
    arrays = read_npz(path, ("mu", "sigma"))
    mu, sigma = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    expected = num_features(extractor)
    if mu.shape != (expected,) or sigma.shape != (expected, expected):
        raise InputError(
            f"{path} has mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}, but {type(extractor).__name__} makes "
            f"{expected} features: it was made with another extractor"
        )
    statistics = Statistics(mu, sigma)
    if "features" in arrays:
        return Reference(statistics, torch.from_numpy(arrays["features"]).float())
    if "arr_0" in arrays:
        pixels = torch.from_numpy(arrays["arr_0"][:MAX_FEATURES])
        found = [
            extractor(batch.to(device_of(extractor))).cpu() for batch in from_pixels(pixels, f"features of {path}")
        ]
        return Reference(statistics, torch.cat(found))
    return Reference(statistics, None)


def from_pixels(pixels: Tensor, progress: str) -> Iterator[Tensor]:
    """Batches (b, 3, H, W) float32 in [0, 1] of uint8 pixels (n, H, W, 3)."""
    for batch in tqdm(pixels.split(BATCH_SIZE), desc=progress, leave=False):
        yield batch.movedim(-1, 1).float() / 255


def read_npz(path: Path, required: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """All arrays of a file; no code in it is run.

    Raises:
        InputError: if it is missing or damaged, or a required array is not in it.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{path} is damaged or not an npz of arrays ({type(error).__name__})") from error
    if missing := [name for name in required if name not in arrays]:
        raise InputError(f"{path} has no array {missing[0]}; it holds {', '.join(arrays) or 'none'}")
    return arrays


def num_features(extractor: nn.Module) -> int:
    """Of an extractor.

    Raises:
        InputError: where it is none.
    """
    features = getattr(extractor, "num_features", None)
    if not isinstance(features, int):
        raise InputError(f"{type(extractor).__name__} is no feature extractor: it has no int attribute num_features")
    return features


def device_of(extractor: nn.Module) -> torch.device:
    return next((parameter.device for parameter in extractor.parameters()), torch.device("cpu"))
