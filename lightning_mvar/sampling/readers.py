"""Readers of sampled images, ours or of other programs: an npz or a folder of PNG files. Images are never resized."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_mvar.data.images.decoding import IMAGE_ERRORS, decode_upright, describe, read_file, to_rgb, to_tensor
from lightning_mvar.data.images.examples import Example
from lightning_mvar.data.images.files import identity_of
from lightning_mvar.data.images.names import visible
from lightning_mvar.errors import InputError
from lightning_mvar.io.npz import NpzArray, array_names, read_text
from lightning_mvar.scales import Shape, format_shape

METADATA_FILE = "sampling.json"  # in a folder of images: how they were drawn
LOSSLESS_MODES = ("RGB", "L", "P")  # PIL modes that convert to 8-bit RGB without loss


class Samples(ABC):
    """Sampled images, in the order of their numbers.

    `metadata` says how they were drawn, if known; `class_names` are the names of their folders, if they have any.
    """

    metadata: dict[str, Any]
    class_names: list[str]
    shape: Shape

    @property
    @abstractmethod
    def identity(self) -> str:
        """Returns a string that changes if the images change."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    @abstractmethod
    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Returns an image (H, W, 3)."""

    @abstractmethod
    def labels(self, class_names: list[str]) -> list[int] | None:
        """Returns the label of each image among `class_names`; None if unknown."""


def open_samples(path: str | Path) -> Samples:
    """Opens the images in an npz, or under a folder.

    Raises:
        InputError: if there are no images, or they have another format.
    """
    path = Path(path)
    if path.is_dir():
        return PngSamples(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; write it with `lightning-mvar sample --out {path}`")
    return NpzSamples(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads the metadata file of a folder of samples, which says how they were drawn.

    Raises:
        InputError: if the file is damaged.
    """
    return parse_metadata(path.read_text(), path)


def parse_metadata(text: str, path: Path) -> dict[str, Any]:
    """Parses metadata from `path`; raises InputError unless it is a JSON object of numbers and strings."""
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is damaged (how its images were drawn is not valid JSON: {error})") from error
    if not isinstance(metadata, dict) or any(isinstance(value, dict | list) for value in metadata.values()):
        raise InputError(f"{path} must say how its images were drawn as a JSON object of numbers and strings")
    return metadata


class NpzSamples(Samples):
    """Images of an npz file: `arr_0` uint8 (n, H, W, 3) and, if present, their classes `arr_1` int64 (n,)."""

    def __init__(self, path: Path) -> None:
        self.rows, self.path = NpzArray(path, "arr_0"), path
        shape, dtype = self.rows.shape, self.rows.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
            raise InputError(f"{path}: arr_0 must be uint8 N x H x W x 3, got {dtype} {' x '.join(map(str, shape))}")
        if self.rows.header.fortran_order:
            raise InputError(f"{path}: arr_0 must be in C order: save numpy.ascontiguousarray(images)")
        self.class_names: list[str] = []
        self.shape: Shape = shape[1:3]
        self.classes: list[int] | None = None
        names = array_names(path)
        if "arr_1" in names:
            classes = NpzArray(path, "arr_1")
            if classes.shape != shape[:1] or classes.dtype.kind not in "iu":
                raise InputError(
                    f"{path}: arr_1 must be the {shape[0]} classes of arr_0, got {classes.dtype} "
                    f"{' x '.join(map(str, classes.shape))}"
                )
            self.classes = classes.read().tolist()
        self.metadata = parse_metadata(read_text(path, "about"), path) if "about" in names else {}

    @property
    def identity(self) -> str:
        return identity_of([self.path.resolve()])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return Example(to_tensor(Image.fromarray(self.pixels(index))), self.classes[index] if self.classes else 0, "")

    def pixels(self, index: int) -> NDArray[np.uint8]:
        return self.rows[index]

    def labels(self, class_names: list[str]) -> list[int] | None:
        return self.classes


class PngSamples(Samples):
    """All PNG files under a folder, sorted by file name; the name of a file's folder is its class."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(visible(root.rglob("*.png")), key=lambda path: (len(path.name), path.name, path))
        if not self.files:
            raise InputError(f"no PNG files under {root}")
        self.root = root
        self.class_names = sorted({path.parent.name for path in self.files})
        first = self.open(self.files[0])
        self.shape: Shape = (first.height, first.width)
        file = root / METADATA_FILE
        self.metadata = read_metadata(file) if file.is_file() else {}

    @property
    def identity(self) -> str:
        return identity_of(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        label = self.class_names.index(self.files[index].parent.name)
        return Example(to_tensor(Image.fromarray(self.pixels(index))), label, str(self.files[index]))

    def pixels(self, index: int) -> NDArray[np.uint8]:
        path = self.files[index]
        image = self.open(path)
        if image.mode not in LOSSLESS_MODES or image.has_transparency_data:
            raise InputError(f"{path} has mode {image.mode}: samples have 8 bits per channel and no transparency")
        pixels = np.asarray(to_rgb(image))
        if pixels.shape[:2] != self.shape:
            raise InputError(f"{path} is {format_shape(pixels.shape[:2])}, the others are {format_shape(self.shape)}")
        return pixels

    @staticmethod
    def open(path: Path) -> Image.Image:
        try:
            return decode_upright(read_file(path))
        except IMAGE_ERRORS as error:
            raise InputError(f"{path} cannot be decoded ({describe(error)}): remove it and draw it again") from error

    def labels(self, class_names: list[str]) -> list[int] | None:
        names = [path.parent.name for path in self.files]
        return [class_names.index(name) for name in names] if set(names) <= set(class_names) else None
