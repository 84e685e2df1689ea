"""Sampled images as other programs and this one leave them: an npz, or a folder of PNG files. None is resized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_mvar.data.images.decoding import IMAGE_ERRORS, to_tensor
from lightning_mvar.data.images.examples import Example, Images
from lightning_mvar.data.images.files import identity_of, visible
from lightning_mvar.errors import InputError
from lightning_mvar.io.npz import NpzRows, names_in, read_npz
from lightning_mvar.scales import Shape, in_words

ABOUT = "sampling.json"  # beside the pictures of a folder: how they were drawn
MODES = ("RGB", "L", "P")  # of pictures that lose nothing as 8-bit RGB


class Samples(Images, Protocol):
    """Sampled images in the order in which they are counted; `about` says how they were drawn, where it is known."""

    about: dict[str, Any]

    def pixels(self, index: int) -> NDArray[np.uint8]: ...  # (H, W, 3)

    def labels(self, class_names: list[str]) -> list[int] | None: ...  # None where unknown


def open_samples(path: str | Path) -> Samples:
    """The images in an npz, or under a folder.

    Raises:
        InputError: if there are none, or they are of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return PngSamples(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; write it with `lightning-mvar sample --out {path}`")
    return NpzSamples(path)


def read_about(path: Path) -> dict[str, Any]:
    """How the samples of a folder were drawn.

    Raises:
        InputError: if the file is damaged.
    """
    return parse_about(path.read_text(), path)


def parse_about(text: str, path: Path) -> dict[str, Any]:
    """Raise InputError unless `text`, of a file, is a JSON object of numbers and words."""
    try:
        about = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is damaged (how its images were drawn is not valid JSON: {error})") from error
    if not isinstance(about, dict) or any(isinstance(value, dict | list) for value in about.values()):
        raise InputError(f"{path} does not say how its images were drawn in numbers and words: it is of something else")
    return about


class NpzSamples:
    """`arr_0` uint8 (n, H, W, 3) of a file, and `arr_1` int64 (n,), their classes, where it has them."""

    def __init__(self, path: Path) -> None:
        self.rows, self.path = NpzRows(path, "arr_0"), path
        shape, dtype = self.rows.shape, self.rows.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise InputError(f"{path}: arr_0 must be uint8 N x H x W x 3, got {dtype} {' x '.join(map(str, shape))}")
        self.class_names: list[str] = []
        self.shape: Shape = shape[1:3]
        self.classes: list[int] | None = None
        names = names_in(path)
        if "arr_1" in names:
            classes = read_npz(path, ["arr_1"])["arr_1"]
            if classes.shape != shape[:1] or classes.dtype.kind not in "iu":
                raise InputError(
                    f"{path}: arr_1 must be the {shape[0]} classes of arr_0, got {classes.dtype} "
                    f"{' x '.join(map(str, classes.shape))}"
                )
            self.classes = classes.tolist()
        self.about = parse_about(str(read_npz(path, ["about"])["about"]), path) if "about" in names else {}

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


class PngSamples:
    """Every PNG file under a folder, in the order of the files' names; their folders' names are their classes."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(visible(root.rglob("*.png")), key=lambda path: (len(path.name), path.name, path))
        if not self.files:
            raise InputError(f"no PNG files under {root}")
        self.root = root
        self.class_names = sorted({path.parent.name for path in self.files})
        with self.open(self.files[0]) as first:
            self.shape: Shape = (first.height, first.width)
        record = root / ABOUT
        self.about = read_about(record) if record.is_file() else {}

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
        try:
            with self.open(path) as file:
                mode, transparent = file.mode, "transparency" in file.info
                found = np.asarray(file.convert("RGB"))
        except IMAGE_ERRORS as error:
            raise InputError(f"{path} cannot be decoded ({error}): remove it, and draw it again") from error
        if mode not in MODES or transparent:
            raise InputError(f"{path} is of mode {mode}: samples have 8 bits a channel and no transparency")
        if found.shape[:2] != self.shape:
            raise InputError(f"{path} is {in_words(found.shape[:2])}, others {in_words(self.shape)}")
        return found

    @staticmethod
    def open(path: Path) -> Image.Image:
        try:
            return Image.open(path)
        except IMAGE_ERRORS as error:
            raise InputError(f"{path} cannot be decoded ({error}): remove it, and draw it again") from error

    def labels(self, class_names: list[str]) -> list[int] | None:
        found = [path.parent.name for path in self.files]
        return [class_names.index(name) for name in found] if set(found) <= set(class_names) else None
