"""Crops of one size: of the embedded images, and of image files of any size."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator

from lightning_mvar.data.builtin.base import EmbeddedSet, Split
from lightning_mvar.data.images.decoding import IMAGE_ERRORS, decode_image, to_tensor
from lightning_mvar.data.images.examples import Example, OnCorrupt
from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.errors import InputError
from lightning_mvar.scales import Shape

RESIZE_MARGIN = 1.125  # the shorter side is resized to this times the crop (VAR's preprocessing)
LONGEST = 16  # times the shorter side; of a longer picture the middle is used, or resizing would fill the memory


class CorruptImageError(InputError):
    """An image file that cannot be decoded."""


class EmbeddedImages:
    """A split of an embedded set. A random crop moves an image by up to the set's margin each way."""

    groups: NDArray[np.int64] | None = None

    def __init__(self, embedded: EmbeddedSet, split: Split) -> None:
        self.class_names, self.shape = list(embedded.class_names), (embedded.resolution, embedded.resolution)
        self.name, self.split, self.margin = embedded.name, split, embedded.margin
        self.wide, self.labels = embedded.load_wide(split)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.wide.numpy().tobytes()).hexdigest()

    @property
    def listing(self) -> str:
        return self.identity

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, self.margin, self.margin)

    def cropped(self, index: int, generator: Generator) -> Example:
        top, left = torch.randint(2 * self.margin + 1, (2,), generator=generator).tolist()
        return self.example(index, top, left)

    def example(self, index: int, top: int, left: int) -> Example:
        height, width = self.shape
        image = self.wide[index, :, top : top + height, left : left + width]
        return Example(image, int(self.labels[index]), self.key(index))

    def key(self, index: int) -> str:
        return f"{self.name}/{self.split}/{index:04d}"


class DecodedImages:
    """Crops of image files, all of one size.

    Args:
        encoded: the files.
        shape: height and width of the crops; the image is first resized (Lanczos) until it covers 1.125 times that,
            which makes its shorter side 1.125 times that of a square.
        on_corrupt: what a file that cannot be decoded does: raise, or come back as an `Example` with an error.
    """

    def __init__(self, encoded: EncodedImages, shape: Shape, on_corrupt: OnCorrupt) -> None:
        self.encoded, self.shape, self.on_corrupt = encoded, shape, on_corrupt
        self.class_names, self.groups = encoded.class_names, encoded.groups

    @property
    def identity(self) -> str:
        return self.encoded.identity

    @property
    def listing(self) -> str:
        return self.encoded.listing

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, None)

    def cropped(self, index: int, generator: Generator) -> Example:
        return self.example(index, generator)

    def example(self, index: int, generator: Generator | None) -> Example:
        label, key, where = int(self.encoded.labels[index]), self.key(index), self.encoded.where(index)
        try:
            data = self.encoded.read(index)
        except OSError as error:  # of the disk or the network: it says nothing against the image
            raise InputError(f"{where} cannot be read ({error}): start again once it can") from error
        try:
            image = decode_image(data)
        except IMAGE_ERRORS as error:
            message = f"{where} cannot be decoded ({error})"
            if self.on_corrupt == "skip":
                return Example(None, label, key, message)
            raise CorruptImageError(
                f"{message}: repair or remove it (or skip it, where the command has --on_corrupt)"
            ) from error
        return Example(to_tensor(self.cut(image, generator)), label, key)

    def key(self, index: int) -> str:
        return self.encoded.key(index)

    def cut(self, image: Image.Image, generator: Generator | None) -> Image.Image:
        """Resize, and crop: where the generator says, else at the centre."""
        image = middle(image, LONGEST * min(image.size))
        crop = self.shape[::-1]  # width and height, as Pillow has sizes
        scale = max(round(RESIZE_MARGIN * least) / side for least, side in zip(crop, image.size, strict=True))
        width, height = (max(round(side * scale), least) for least, side in zip(crop, image.size, strict=True))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        room = (width - crop[0], height - crop[1])
        if generator is None:
            left, top = (side // 2 for side in room)
        else:
            left, top = (int(torch.randint(side + 1, (), generator=generator)) for side in room)
        return image.crop((left, top, left + crop[0], top + crop[1]))


def middle(image: Image.Image, longest: int) -> Image.Image:
    """A picture without what its longer side has beyond `longest` pixels, at both ends alike."""
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image
