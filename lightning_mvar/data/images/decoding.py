"""Decodes image files of any pixel format to RGB, and converts images to tensors."""

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
    """Decodes an image file to upright 8-bit RGB.

    Grey, palette, CMYK and 16-bit images are converted; transparent ones are composited on white. Pillow refuses images
    of more than 179 million pixels as possible decompression bombs.

    Raises:
        Exception: one of `IMAGE_ERRORS`, if the file cannot be decoded.
    """
    try:
        file = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise OSError("it is empty or of no image format that Pillow knows") from error
    with file:
        file.load()
        image: Image.Image = file
    with suppress(*IMAGE_ERRORS):  # the pixels are usable even if the EXIF record is damaged
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; `convert` would clip it at 255
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
