"""The embedded photos: patches of ten sample photos that ship with scikit-learn and scikit-image.

Each photo is a class. Its columns are divided into alternating train and test bands. The gaps between them are wider
than the resizing filter, so the splits share no pixel of a photo.
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
from lightning_mvar.data.images.decoding import read_image
from lightning_mvar.errors import InputError, install

PHOTO_FILES = {  # by class: package and file within it
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
MAX_SHORTER_SIDE = 432  # in pixels; at this scale a patch shows a stone or two, blades of grass, a petal
MARGIN = 4  # maximum shift of a random crop in pixels, within the patch's band
STRIDE = 8
PATCHES_PER_CLASS = {"train": 200, "test": 45}
MIN_CONTRAST = 0.04  # standard deviation of gray in [0, 1]; patches below it count as empty


@dataclass(frozen=True)
class BandLayout:
    """Division of a photo's columns: one band per split in each period of `period` pixels."""

    resolution: int
    train: tuple[int, int]  # [first, end) columns within a period
    test: tuple[int, int]
    period: int

    @property
    def side(self) -> int:
        """Side of a patch with its margin, in pixels."""
        return self.resolution + 2 * MARGIN


LAYOUT_32 = BandLayout(RESOLUTION, (0, 80), (88, 136), 144)
LAYOUT_64 = BandLayout(64, (0, 96), (104, 176), 184)


@cache
def load_photos_with_margin(split: Split, layout: BandLayout = LAYOUT_32) -> tuple[Tensor, Tensor]:
    """Returns patches with margin (n, 3, side, side) float32 in [-1, 1] and labels (n,) int64; classes alternate.

    Each class has the same number of patches, spread evenly over the non-empty ones on a grid of `STRIDE` pixels: 2,000
    train and 450 test patches in total.

    Raises:
        InputError: if the split does not exist or a photo is not installed.
    """
    check_split("photos", split, ("train", "test"))
    classes = [select_patches(read_photo(file), split, layout) for file in PHOTO_FILES.values()]
    patches = np.stack(classes, axis=1).reshape(-1, *classes[0].shape[1:])  # (n, side, side, 3) uint8
    labels = torch.arange(len(PHOTO_FILES)).repeat(PATCHES_PER_CLASS[split])
    return torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def read_photo(file: str) -> NDArray[np.uint8]:
    """Reads a photo of a package as (H, W, 3); one with a shorter side above MAX_SHORTER_SIDE is reduced (Lanczos)."""
    photo = read_image(find_installed_file(file))
    scale = min(MAX_SHORTER_SIDE / min(photo.size), 1)
    width, height = (round(side * scale) for side in photo.size)
    return np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))


def find_installed_file(file: str) -> Path:
    """Locates a file of a package without importing the package, which takes seconds.

    Raises:
        InputError: if the package is not installed or lacks the file.
    """
    package, _, relative_path = file.partition("/")
    spec = find_spec(package)
    path = Path(spec.origin).parent / relative_path if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise InputError(f"the photos need {file} of scikit-learn and scikit-image: {install('demo')}")
    return path


def select_patches(photo: NDArray[np.uint8], split: Split, layout: BandLayout = LAYOUT_32) -> NDArray[np.uint8]:
    """Selects the patches of a class (n, side, side, 3), with margin, from its photo (H, W, 3)."""
    side = layout.side
    positions = patch_positions(photo, split, layout)
    patches = np.stack([photo[top : top + side, left : left + side] for top, left in positions])
    gray = patches[:, MARGIN:-MARGIN, MARGIN:-MARGIN].mean(axis=3) / 255
    textured = patches[gray.std(axis=(1, 2)) >= MIN_CONTRAST]
    return textured[np.linspace(0, len(textured) - 1, PATCHES_PER_CLASS[split]).round().astype(int)]


def patch_positions(photo: NDArray[np.uint8], split: Split, layout: BandLayout) -> list[tuple[int, int]]:
    """Lists (top, left) of each patch with margin on the grid within the split's bands."""
    height, width = photo.shape[:2]
    side = layout.side
    first, end = layout.train if split == "train" else layout.test
    return [
        (top, left)
        for start in range(0, width, layout.period)
        for left in range(start + first, min(start + end, width) - side + 1, STRIDE)
        for top in range(0, height - side + 1, STRIDE)
    ]


PHOTOS = EmbeddedSet("photos", tuple(PHOTO_FILES), MARGIN, load_photos_with_margin)
PHOTOS64 = EmbeddedSet(
    "photos64", tuple(PHOTO_FILES), MARGIN, partial(load_photos_with_margin, layout=LAYOUT_64), LAYOUT_64.resolution
)
