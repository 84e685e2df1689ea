"""Crops of a fixed size, from the embedded sets and from image files of any size."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator

from lightning_mvar.data.builtin.base import EmbeddedSet, Split
from lightning_mvar.data.images.decoding import UnusableFileError, decode_image, to_tensor
from lightning_mvar.data.images.examples import Example, OnCorrupt
from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.data.images.protocols import DEFAULT_RESIZING, NOT_CROPPED, Resizing, center_offset, resize_to_cover
from lightning_mvar.errors import InputError, one_line
from lightning_mvar.scales import Shape

MAX_ASPECT_RATIO = 16  # longer images are first cropped to their middle, because resizing them could exhaust memory


class CorruptImageError(InputError):
    """An image file that cannot be decoded."""


class EmbeddedImages:
    """One split of an embedded set. A random crop shifts an image by up to the set's margin in each direction."""

    crop = NOT_CROPPED
    groups: NDArray[np.int64] | None = None

    def __init__(self, embedded: EmbeddedSet, split: Split) -> None:
        self.class_names, self.shape = list(embedded.class_names), (embedded.resolution, embedded.resolution)
        self.name, self.split, self.margin = embedded.name, split, embedded.margin
        self.with_margin, labels = embedded.load_with_margin(split)
        self.labels = labels.numpy()

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.with_margin.numpy().tobytes()).hexdigest()

    @property
    def listing(self) -> str:
        return self.identity

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, self.margin, self.margin)

    def random_crop(self, index: int, generator: Generator) -> Example:
        top, left = torch.randint(2 * self.margin + 1, (2,), generator=generator).tolist()
        return self.example(index, top, left)

    def example(self, index: int, top: int, left: int) -> Example:
        height, width = self.shape
        image = self.with_margin[index, :, top : top + height, left : left + width]
        return Example(image, int(self.labels[index]), self.key(index))

    def key(self, index: int) -> str:
        return f"{self.name}/{self.split}/{index:04d}"


class DecodedImages:
    """Crops of image files, all of one size.

    Args:
        encoded: the image files.
        shape: height and width of the crops.
        on_corrupt: whether a file that cannot be decoded raises or gives an `Example` with an error.
        resizing: how images are resized before they are cropped.
    """

    def __init__(
        self, encoded: EncodedImages, shape: Shape, on_corrupt: OnCorrupt, resizing: Resizing = DEFAULT_RESIZING
    ) -> None:
        self.encoded, self.shape, self.on_corrupt = encoded, shape, on_corrupt
        self.class_names, self.labels, self.groups = encoded.class_names, encoded.labels, encoded.groups
        self.resizing, self.crop = resizing, str(resizing)

    @property
    def identity(self) -> str:
        """Hash of the files, marked if some may be skipped, so that an incomplete set has its own cache entries."""
        return f"{self.encoded.identity} skip" if self.on_corrupt == "skip" else self.encoded.identity

    @property
    def listing(self) -> str:
        return self.encoded.listing

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, None)

    def random_crop(self, index: int, generator: Generator) -> Example:
        return self.example(index, generator)

    def example(self, index: int, generator: Generator | None) -> Example:
        label, key, path = int(self.encoded.labels[index]), self.key(index), self.encoded.display_path(index)
        try:
            image = decode_image(self.encoded.read(index))
        except OSError as error:  # a disk or network failure: the image may be intact, so it is not skipped
            raise InputError(
                f"{path} cannot be read ({error}): make it readable, then run the command again"
            ) from error
        except UnusableFileError as error:
            return self.failed(index, error)
        return Example(to_tensor(self.resize_and_crop(image, generator)), label, key)

    def failed(self, index: int, error: UnusableFileError) -> Example:
        """Returns an example without an image or raises CorruptImageError, depending on `on_corrupt`."""
        message = f"{self.encoded.display_path(index)} cannot be decoded ({one_line(error)})"
        if self.on_corrupt == "skip":
            return Example(None, int(self.encoded.labels[index]), self.key(index), message)
        raise CorruptImageError(
            f"{message}: repair or remove it, or skip it with --on_corrupt skip where the command has it "
            f"(train-tokenizer: --data.on_corrupt skip)"
        ) from error

    def key(self, index: int) -> str:
        return self.encoded.key(index)

    def resize_and_crop(self, image: Image.Image, generator: Generator | None) -> Image.Image:
        """Resizes an image and crops it at a random position from `generator`, or at the center if None."""
        image = limit_longer_side(image, MAX_ASPECT_RATIO * min(image.size))
        crop = self.shape[::-1]  # (width, height), as in Pillow
        image = resize_to_cover(image, crop, self.resizing)
        slack = (image.width - crop[0], image.height - crop[1])
        if generator is None:
            left, top = (center_offset(side, self.resizing.protocol) for side in slack)
        else:
            left, top = (int(torch.randint(side + 1, (), generator=generator)) for side in slack)
        return image.crop((left, top, left + crop[0], top + crop[1]))


def limit_longer_side(image: Image.Image, max_side: int) -> Image.Image:
    """Crops both ends of the longer side equally to at most `max_side` pixels."""
    width, height = (min(side, max_side) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image
