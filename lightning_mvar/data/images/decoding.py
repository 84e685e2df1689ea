"""From the bytes of an image file to RGB pixels, whatever the file's kind of pixels, and to numbers."""

from __future__ import annotations

import struct
from contextlib import suppress
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode_image(data: bytes) -> Image.Image:
    """The picture in 8-bit RGB, upright.

    Grey, palette, CMYK and 16-bit pictures are converted; what is transparent is laid on white. One of more than 179
    million pixels is refused, as Pillow does, for it may be made to fill the memory.

    Raises:
        Exception: one of `IMAGE_ERRORS`, if it cannot be decoded.
    """
    try:
        file = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:  # whose message has an address in memory
        raise OSError("it is empty, or of no kind of image that Pillow knows") from error
    with file:
        file.load()
        image: Image.Image = file
    with suppress(*IMAGE_ERRORS):  # a damaged EXIF record says nothing against the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
