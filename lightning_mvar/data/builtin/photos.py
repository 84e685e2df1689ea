"""The embedded textures: patches of ten sample photos that come with scikit-learn and scikit-image, no download.

A photo is a class. Its columns are divided into bands, train and test in turn, with a gap between them wider than what
resizing mixes, so that no pixel of a photo is in both splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_mvar.data.builtin.base import RESOLUTION, EmbeddedSet, Split, check_split
from lightning_mvar.errors import InputError

FILES = {  # class -> package, and file in it
    "brick": "skimage/data/brick.png",
    "cat": "skimage/data/chelsea.png",
    "coins": "skimage/data/coins.png",
    "dahlia": "sklearn/datasets/images/flower.jpg",
    "galaxies": "skimage/data/hubble_deep_field.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "pagoda": "sklearn/datasets/images/china.jpg",
    "tissue": "skimage/data/ihc.png",
}
SHORTER_SIDE = 432  # pixels that a larger photo is reduced to: a patch shows a stone or two, blades of grass, a petal
MARGIN = 4  # pixels that a random crop of a patch can move by, inside its band
STRIDE = 8
PER_CLASS = {"train": 200, "test": 45}
LEAST_CONTRAST = 0.04  # standard deviation of grey in [0, 1] below which a patch is taken for empty


@dataclass(frozen=True)
class Layout:
    """How a photo's columns are divided: in each period of so many pixels one band of each split."""

    resolution: int
    train: tuple[int, int]  # first column, and the one after the last
    test: tuple[int, int]
    period: int

    @property
    def side(self) -> int:
        """Of a patch with its margin."""
        return self.resolution + 2 * MARGIN


SMALL = Layout(RESOLUTION, (0, 80), (88, 136), 144)
LARGE = Layout(64, (0, 96), (104, 176), 184)


@cache
def load_wide_photos(split: Split, layout: Layout = SMALL) -> tuple[Tensor, Tensor]:
    """Patches with their margin (n, 3, side, side) float32 in [-1, 1], and labels (n,) int64, the classes in turn.

    Of the patches on a grid of `STRIDE` pixels that are not empty, every class has the same number, evenly spread:
    2,000 train, 450 test in all.

    Raises:
        InputError: if there is no such split, or a photo is not installed.
    """
    check_split("photos", split)
    classes = [chosen_patches(read_photo(file), split, layout) for file in FILES.values()]
    patches = np.stack(classes, axis=1).reshape(-1, *classes[0].shape[1:])  # (n, side, side, 3) uint8
    labels = torch.arange(len(FILES)).repeat(PER_CLASS[split])
    return torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def read_photo(file: str) -> NDArray[np.uint8]:
    """(H, W, 3) of a file of a package, the shorter side reduced to `SHORTER_SIDE` where it is longer (Lanczos)."""
    with Image.open(installed(file)) as photo:
        scale = min(SHORTER_SIDE / min(photo.size), 1)
        width, height = (round(side * scale) for side in photo.size)
        return np.asarray(photo.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))


def installed(file: str) -> Path:
    """Where a file of a package is, found without importing the package, which takes seconds.

    Raises:
        InputError: if the package is not installed, or has no such file.
    """
    package, _, inside = file.partition("/")
    spec = find_spec(package)
    path = Path(spec.origin).parent / inside if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise InputError(f"the photos need {file} of scikit-learn and scikit-image: pip install 'lightning-mvar[demo]'")
    return path


def chosen_patches(photo: NDArray[np.uint8], split: Split, layout: Layout = SMALL) -> NDArray[np.uint8]:
    """(n, side, side, 3): as many patches of a photo (H, W, 3) as a class has, with their margin."""
    side = layout.side
    wide = np.stack([photo[top : top + side, left : left + side] for top, left in places(photo, split, layout)])
    grey = wide[:, MARGIN:-MARGIN, MARGIN:-MARGIN].mean(axis=3) / 255
    textured = wide[grey.std(axis=(1, 2)) >= LEAST_CONTRAST]
    return textured[np.linspace(0, len(textured) - 1, PER_CLASS[split]).round().astype(int)]


def places(photo: NDArray[np.uint8], split: Split, layout: Layout) -> list[tuple[int, int]]:
    """Top and left of every patch with its margin on the grid of the split's bands."""
    height, width = photo.shape[:2]
    side = layout.side
    first, end = layout.train if split == "train" else layout.test
    return [
        (top, left)
        for period in range(0, width, layout.period)
        for left in range(period + first, min(period + end, width) - side + 1, STRIDE)
        for top in range(0, height - side + 1, STRIDE)
    ]


PHOTOS = EmbeddedSet("photos", tuple(FILES), MARGIN, load_wide_photos)
PHOTOS64 = EmbeddedSet("photos64", tuple(FILES), MARGIN, partial(load_wide_photos, layout=LARGE), LARGE.resolution)
