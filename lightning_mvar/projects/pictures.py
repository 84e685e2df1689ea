"""Inspects a set of pictures: their number and sizes, and which are transparent or broken."""

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

MAX_DECODED = 5000  # of a larger set, this many evenly spaced pictures are decoded
SQUARE = 1.05  # ratio of the sides up to which a picture counts as square


@dataclass(frozen=True)
class Pictures:
    """Summary of the pictures of a source.

    Args:
        count: number of pictures.
        num_held_out: how many of them are held out for validation.
        class_names: names of the classes.
        untrained: names of the classes without a picture to train on.
        sizes: (n, 2) int64 width and height in pixels of the decoded pictures; a large set is sampled.
        transparent: number of decoded pictures with transparent pixels.
        broken: one message per picture that could not be decoded; a large set is sampled.
    """

    count: int
    num_held_out: int
    class_names: list[str]
    untrained: list[str]
    sizes: NDArray[np.int64]
    transparent: int
    broken: list[str]

    @property
    def side(self) -> int:
        """Median of the shorter sides in pixels."""
        return int(np.median(self.sizes.min(axis=1)))

    @property
    def num_broken(self) -> int:
        """Number of pictures that cannot be decoded, for a large set estimated from the sample."""
        return round(self.count * len(self.broken) / (len(self.sizes) + len(self.broken)))

    @property
    def oblong(self) -> float:
        """Share of the pictures that are not square."""
        return float(np.mean(self.sizes.max(axis=1) > SQUARE * self.sizes.min(axis=1)))

    @property
    def are_square(self) -> bool:
        """Whether nearly all pictures are square, so that a crop without margin shows them whole."""
        return self.oblong < 0.1


def inspect_pictures(images: EncodedImages, name: str) -> Pictures:
    """Decodes up to `MAX_DECODED` pictures of a source, with a progress bar.

    Args:
        images: pictures of the source.
        name: the source, for messages.

    Raises:
        InputError: if no picture can be decoded, or a file cannot be read.
    """
    examined = spaced_evenly(len(images), MAX_DECODED).tolist()
    sizes, transparent, broken = [], 0, []
    for index in tqdm(examined, desc="inspecting the pictures", unit="img", leave=False):
        try:
            picture = decode_upright(images.read(index))
        except UnusableFileError as error:
            broken.append(f"{images.display_path(index)} cannot be decoded ({one_line(error)})")
            continue
        sizes.append(picture.size)
        transparent += is_transparent(picture)
    if not sizes:
        raise InputError(f"none of the {len(examined)} pictures of {name} can be decoded: {broken[0]}")
    held_out = images.held_out
    to_train = np.bincount(images.labels[~held_out], minlength=len(images.class_names))
    untrained = [name for name, count in zip(images.class_names, to_train, strict=True) if count == 0]
    num_held_out = int(held_out.sum())
    return Pictures(len(images), num_held_out, images.class_names, untrained, np.array(sizes), transparent, broken)


def is_transparent(picture: Image.Image) -> bool:
    """Returns whether a picture has pixels that are not opaque."""
    if not picture.has_transparency_data:
        return False
    darkest, _ = picture.convert("RGBA").getchannel("A").getextrema()
    return bool(darkest < 255)  # type: ignore[operator]  # one channel
