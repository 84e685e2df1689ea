"""A first look at a set of pictures: how many there are, their sizes, and which are transparent or broken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from lightning_mvar.data.images.decoding import UnusableFileError, decode_upright
from lightning_mvar.data.images.examples import spaced_evenly
from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.errors import InputError, one_line

MAX_DECODED = 5000  # pictures of a larger set are spread evenly over it
SQUARE = 1.05  # ratio of the sides up to which a picture counts as square


@dataclass(frozen=True)
class Pictures:
    """What a look at the pictures of a source has found.

    Args:
        count: number of pictures.
        num_held_out: how many of them are held out for validation.
        class_names: names of the classes.
        sizes: (n, 2) width and height of the decoded pictures; of a large set, a sample.
        transparent: number of decoded pictures with transparent pixels.
        broken: a message per picture that cannot be decoded, among the same.
    """

    count: int
    num_held_out: int
    class_names: list[str]
    sizes: NDArray[np.int64]
    transparent: int
    broken: list[str]

    @property
    def side(self) -> int:
        """Median of the shorter sides."""
        return int(np.median(self.sizes.min(axis=1)))

    @property
    def num_broken(self) -> int:
        """Number of pictures that cannot be decoded; of a large set, estimated from the sample."""
        return round(self.count * len(self.broken) / (len(self.sizes) + len(self.broken)))

    @property
    def are_square(self) -> bool:
        """Whether nearly all pictures are square, so that a crop without margin cuts nothing off."""
        return bool(np.mean(self.sizes.max(axis=1) <= SQUARE * self.sizes.min(axis=1)) > 0.9)


def look_at(images: EncodedImages, name: str) -> Pictures:
    """Decodes the pictures of a source, or `MAX_DECODED` of them, with a progress bar.

    Raises:
        InputError: if none can be decoded, or a file cannot be read.
    """
    examined = spaced_evenly(len(images), MAX_DECODED).tolist()
    sizes, transparent, broken = [], 0, []
    for index in tqdm(examined, desc="looking at the pictures", unit="img", leave=False):
        try:
            picture = decode_upright(images.read(index))
        except UnusableFileError as error:
            broken.append(f"{images.display_path(index)} cannot be decoded ({one_line(error)})")
            continue
        sizes.append(picture.size)
        transparent += is_transparent(picture)
    if not sizes:
        raise InputError(f"none of the {len(examined)} pictures of {name} can be decoded: {broken[0]}")
    held_out = int(images.held_out.sum())
    return Pictures(len(images), held_out, images.class_names, np.array(sizes), transparent, broken)


def is_transparent(picture: Image.Image) -> bool:
    """Returns whether a picture has pixels that are not opaque."""
    if not picture.has_transparency_data:
        return False
    darkest, _ = picture.convert("RGBA").getchannel("A").getextrema()
    return bool(darkest < 255)  # type: ignore[operator]  # one channel
