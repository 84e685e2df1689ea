"""What real images look like to a feature extractor: measured once, by all ranks together, and kept in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.data.images import Example, Images, collate, open_images, to_tensor
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


def load_reference(
    extractor: nn.Module, source: str, resolution: int, cache: Path, with_features: bool = True
) -> Reference:
    """The reference that `source` names, for images of `resolution` pixels a side.

    Measuring is divided among the ranks, which must all call this; what is measured is kept in the folder `cache`.

    Args:
        extractor: prepared, on the device to compute on.
        source: `digits:train` or `digits:test`, a folder of class folders, or an npz with `mu` and `sigma`, such as the
            published ADM / OpenAI files: the extractor must be the one that they were made with. With the images
            themselves in `arr_0` (uint8, N x H x W x 3), precision and recall can be computed too.
        resolution: side of the images of a folder, after resizing and cropping.
        cache: folder for what is measured.
        with_features: whether precision and recall are wanted.

    Raises:
        InputError: if the source does not exist, is damaged, or is not for this extractor.
    """
    if source.endswith(".npz"):
        return published_reference(extractor, Path(source), cache, with_features)
    images = open_images(source, resolution)
    return kept_or_measured(extractor, lambda: images, f"{source} {images.identity} {images.resolution}", cache)


def published_reference(extractor: nn.Module, path: Path, cache: Path, with_features: bool) -> Reference:
    """Statistics as they are in the file; features measured on its images, where they are wanted and there."""
    statistics = read_statistics(extractor, path)
    if not with_features or "arr_0" not in names_in(path):
        return Reference(statistics, None)
    about = path.stat()
    identity = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    return Reference(statistics, kept_or_measured(extractor, lambda: Pixels(path), identity, cache).features)


def kept_or_measured(extractor: nn.Module, images: Callable[[], Images], identity: str, cache: Path) -> Reference:
    key = hashlib.sha256(f"{identity} {fingerprint(extractor)}".encode()).hexdigest()[:16]
    path = cache / f"{type(extractor).__name__}-{key}.npz"
    if told_by_first_rank(path.is_file()):
        features = torch.from_numpy(read_npz(path, ["features"])["features"])
        return Reference(read_statistics(extractor, path), features)
    reference = measure(extractor, images(), f"features of {identity.split()[0]}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        reference.save(path)
    return reference


class Pixels:
    """The images in the array `arr_0` of a file, as a source."""

    def __init__(self, path: Path) -> None:
        self.pixels = read_npz(path, ["arr_0"])["arr_0"]
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[-1] != 3:
            raise InputError(f"{path}: arr_0 must be uint8 N x H x W x 3, got {self.pixels.dtype} {self.pixels.shape}")
        self.class_names: list[str] = []
        self.identity, self.resolution = str(path), self.pixels.shape[1]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Example:
        return Example(to_tensor(Image.fromarray(self.pixels[index])), 0, str(index))


def told_by_first_rank(value: bool) -> bool:
    """The same on all ranks, though files may appear between their looks."""
    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


@torch.no_grad()
def measure(extractor: nn.Module, images: Images, progress: str) -> Reference:
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


def stack(images: Images, numbers: list[int]) -> Tensor:
    """Some images of a source, (n, 3, H, W) float32 in [0, 1]."""
    return (collate([images[number] for number in numbers]).images + 1) / 2


def read_statistics(extractor: nn.Module, path: Path) -> Statistics:
    arrays = read_npz(path, ["mu", "sigma"])
    mu, sigma = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    expected = num_features(extractor)
    if mu.shape != (expected,) or sigma.shape != (expected, expected):
        raise InputError(
            f"{path} has mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}, but {type(extractor).__name__} makes "
            f"{expected} features: it was made with another extractor"
        )
    return Statistics(mu, sigma)


def read_npz(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    """Some arrays of a file, and no others; no code in it is run.

    Raises:
        InputError: if it is missing or damaged, or an array is not in it.
    """
    if missing := [name for name in names if name not in names_in(path)]:
        raise InputError(f"{path} has no array {missing[0]}; it holds {', '.join(names_in(path)) or 'none'}")
    with readable(path), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


def names_in(path: Path) -> list[str]:
    with readable(path), np.load(path, allow_pickle=False) as file:
        return list(file.files)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise InputError where a file is missing, or cannot be read as an npz of arrays."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, AttributeError, BadZipFile) as error:
        raise InputError(f"{path} is damaged or not an npz of arrays ({type(error).__name__})") from error


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
