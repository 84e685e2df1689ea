"""Readers of sampled images, drawn by any program: an npz or a folder of pictures. Images are never resized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_mvar.data.images.decoding import (
    MAX_PIXELS,
    SUFFIXES,
    SUFFIXES_BY_FORMAT,
    UnusableFileError,
    decode_upright,
    read_file,
    to_rgb,
    to_tensor,
)
from lightning_mvar.data.images.examples import Example
from lightning_mvar.data.images.files import identity_of, list_folder
from lightning_mvar.data.images.names import Skipped, without_suffix
from lightning_mvar.data.images.protocols import UNKNOWN_CROP
from lightning_mvar.errors import InputError, one_line
from lightning_mvar.io.files import read_regular
from lightning_mvar.io.json_files import parse_json
from lightning_mvar.io.locks import LOCK
from lightning_mvar.io.npz import NpzArray, array_names, read_text
from lightning_mvar.scales import Shape, format_shape

METADATA_FILE = "sampling.json"  # in a folder of images: how they were drawn
MAX_METADATA_BYTES = 2**20
SIZE_PROBES = 9  # images that are read to find the size of the set
FORMAT_BY_SUFFIX = {suffix: name for name, suffixes in SUFFIXES_BY_FORMAT.items() for suffix in suffixes}
LOSSLESS_MODES = ("RGB", "L", "P")  # PIL modes that convert to 8-bit RGB without loss


class Samples(ABC):
    """Sampled images, ordered by number.

    `metadata` says how they were drawn, if known; `class_names` are the names of their class folders, if any;
    `file_format` is NPZ or the formats of the pictures, such as PNG or JPEG+PNG.
    """

    metadata: dict[str, Any]
    file_format: str
    class_names: list[str]
    shape: Shape
    crop = UNKNOWN_CROP

    @property
    @abstractmethod
    def identity(self) -> str:
        """A string that changes if the images change."""

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
    """Opens the images in an npz or under a folder.

    Raises:
        InputError: if there are no images, or they have another format.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderSamples(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; write it with `lightning-mvar sample --out {path}`")
    return NpzSamples(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads the metadata file of a folder of samples, which says how they were drawn.

    Raises:
        InputError: if the file is damaged.
    """
    return parse_metadata(read_regular(path, MAX_METADATA_BYTES), path)


def parse_metadata(text: str | bytes, path: Path) -> dict[str, Any]:
    """Parses metadata from `path`; raises InputError unless it is a JSON object of numbers and strings."""
    try:
        return parse_json(text, dict[str, bool | int | float | str | None], "the record")
    except InputError as error:
        raise InputError(
            f"{path} is damaged: it must describe its images as a JSON object of numbers and strings ({error})"
        ) from error


class NpzSamples(Samples):
    """Images of an npz file: `arr_0` uint8 (n, H, W, 3) and, if present, their classes `arr_1` int64 (n,)."""

    file_format = "NPZ"

    def __init__(self, path: Path) -> None:
        self.rows, self.path = NpzArray(path, "arr_0"), path
        shape, dtype = self.rows.shape, self.rows.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
            raise InputError(f"{path}: arr_0 must be uint8 N x H x W x 3, got {dtype} {' x '.join(map(str, shape))}")
        if shape[1] * shape[2] > MAX_PIXELS:
            raise InputError(
                f"{path}: images of {shape[1]} x {shape[2]} pixels are too large; use at most {MAX_PIXELS} pixels"
            )
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


class FolderSamples(Samples):
    """All pictures in a folder or in its class folders, sorted by file name; a picture's folder names its class.

    Skipped files are reported once. Pictures that may be something other than samples are refused.

    Raises:
        InputError: if there are no pictures, some lie beside class folders, or two have the same name.
    """

    def __init__(self, root: Path) -> None:
        skipped = Skipped()
        names = sorted(list_folder(root, skipped, known=(METADATA_FILE, LOCK))[1], key=number_order)
        if not names:
            raise InputError(f"no images under {root}: expected files that end in {', '.join(SUFFIXES)}")
        refuse_ambiguous(names, root)
        skipped.report(str(root))
        self.files = [root / name for name in names]
        self.class_names = sorted({path.parent.name for path in self.files})
        self.file_format = "+".join(sorted({FORMAT_BY_SUFFIX[path.suffix.lower()] for path in self.files}))
        self.shape = self.most_frequent_shape()
        file = root / METADATA_FILE
        self.metadata = read_metadata(file) if file.is_file() else {}

    def most_frequent_shape(self) -> Shape:
        """Returns the most frequent size of a few images, so that errors name a picture of another size."""
        shapes = Counter[Shape]()
        for path in self.files[:: -(-len(self.files) // SIZE_PROBES)]:
            with suppress(InputError):  # raised again when the image is read
                image = self.open(path)
                shapes[image.height, image.width] += 1
        if not shapes:
            self.open(self.files[0])
        return shapes.most_common(1)[0][0]

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
        except (UnusableFileError, OSError) as error:
            raise InputError(f"{path} cannot be decoded ({one_line(error)}): remove it and draw it again") from error

    def labels(self, class_names: list[str]) -> list[int] | None:
        names, numbers = [path.parent.name for path in self.files], {name: i for i, name in enumerate(class_names)}
        return [numbers[name] for name in names] if set(names) <= set(numbers) else None


def number_order(name: str) -> tuple[int, str, str]:
    """Returns a key that sorts paths by the number in their file name, across folders."""
    file = name.rpartition("/")[2]
    return len(without_suffix(file)), without_suffix(file), name


def refuse_ambiguous(names: list[str], root: Path) -> None:
    """Raises InputError if some pictures may not be samples, or two may be the same sample or have the same class."""
    depths = Counter(name.count("/") for name in names)
    if len(depths) > 1:
        rarest = min(depths, key=lambda depth: (depths[depth], depth))
        odd = next(name for name in names if name.count("/") == rarest)
        raise InputError(
            f"{root / odd} is next to class folders: put all samples in one folder or all in class folders, and remove "
            f"other images"
        )
    folders: dict[str, str] = {}
    stems: dict[str, str] = {}
    for name in names:
        parent = name.rpartition("/")[0]
        if folders.setdefault(parent.rpartition("/")[2], parent) != parent:
            other = folders[parent.rpartition("/")[2]]
            raise InputError(f"{root / other} and {root / parent} have the same name: score each set by itself")
        if (other := stems.setdefault(without_suffix(name), name)) != name:
            raise InputError(f"{root / other} and {root / name} may be the same sample: remove one of them")
