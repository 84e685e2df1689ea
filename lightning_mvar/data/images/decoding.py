"""Decodes raster image files to upright 8-bit RGB in bounded memory, and converts images to tensors."""

from __future__ import annotations

import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_mvar.errors import InputError, one_line
from lightning_mvar.io.files import open_if_regular

SUFFIXES_BY_FORMAT = {  # formats that Pillow decodes by itself, unlike EPS, PDF or WMF
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
    "PPM": (".ppm", ".pgm", ".pbm"),
}
SUFFIXES = tuple(suffix for suffixes in SUFFIXES_BY_FORMAT.values() for suffix in suffixes)
Image.init()
FORMATS = tuple(name for name in SUFFIXES_BY_FORMAT if name in Image.OPEN)  # older versions of Pillow lack AVIF

MAX_PIXELS = 120_000_000  # a JPEG or PNG of this size takes 1 GB, a WebP 3 GB
MAX_IMAGE_BYTES = 2**30  # size of a file
STRIP_PIXELS = 2**20  # pixels converted to RGB at once
PILLOW_ERRORS = (  # raised by its plugins for damaged files
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError, RuntimeError),
    *(struct.error, zlib.error),
)

ORIENTATION = 0x0112  # EXIF tag
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_ORIENTATION = (  # chunks that may hold the orientation
    *(b"eXIf", b"iTXtXML:com.adobe.xmp\0\0", b"zTXtRaw profile type exif\0", b"tEXtRaw profile type exif\0"),
)
MAX_PNG_RECORD = 2**18  # bytes of such a chunk


class UnusableFileError(ValueError):
    """The content of an image file is missing, damaged or too large."""


class TooManyPixelsError(UnusableFileError):
    """An image is too large to be decoded."""


def read_image(path: str | Path) -> Image.Image:
    """Reads an image file as `decode_image` does.

    Raises:
        InputError: if the file does not exist, is not a regular file, or cannot be decoded.
    """
    try:
        return decode_image(read_file(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (UnusableFileError, OSError) as error:
        raise InputError(f"{path} cannot be decoded ({one_line(error)})") from error


def read_file(path: str | Path) -> bytes:
    """Returns the bytes of a regular file.

    Raises:
        OSError: if it cannot be read.
        UnusableFileError: if it is not a regular file, or has more than `MAX_IMAGE_BYTES`.
    """
    file = open_if_regular(path)
    if file is None:
        raise UnusableFileError("it is not a regular file")
    with file:
        check_bytes(os.fstat(file.fileno()).st_size)
        return file.read()


def check_bytes(size: int) -> None:
    """Raises UnusableFileError if an image file is larger than `MAX_IMAGE_BYTES`."""
    if size > MAX_IMAGE_BYTES:
        raise UnusableFileError(f"it has {size} bytes, more than {MAX_IMAGE_BYTES}")


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to upright 8-bit RGB; see `decode_upright` and `to_rgb`.

    Raises:
        UnusableFileError: if the file cannot be decoded.
    """
    return to_rgb(decode_upright(data, max_pixels))


def decode_upright(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the first frame of an image file in its own mode, applies its EXIF orientation and drops its metadata.

    Args:
        data: content of a file in one of `FORMATS`.
        max_pixels: images with more pixels are refused before they are decoded.

    Raises:
        TooManyPixelsError: if it has more than `max_pixels`.
        UnusableFileError: if it cannot be decoded for another reason.
    """
    if data.startswith(PNG_SIGNATURE):
        data = essential_png(data)
    with pillow_errors():
        file = Image.open(BytesIO(data), formats=FORMATS)
    with file:
        if file.width * file.height > max_pixels:
            raise TooManyPixelsError(f"it has {file.width} x {file.height} pixels, more than {max_pixels}")
        scale_transparent_value(file)
        with pillow_errors():
            if file.format == "PNG":
                file.load()  # an EXIF record may follow the pixels
            orientation = pop_orientation(file)
            file.load()
        file.info = {name: value for name, value in file.info.items() if name == "transparency"}
        transposition = TRANSPOSITIONS.get(orientation)
        return file if transposition is None else file.transpose(transposition)


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turns Pillow's errors into UnusableFileError and ignores its warnings.

    The warnings are about metadata that is not used here and sizes that are checked here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise UnusableFileError(f"it is empty, damaged or not one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(one_line(error)) from error
    except PILLOW_ERRORS as error:
        raise UnusableFileError(one_line(error)) from error


def pop_orientation(file: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, and sets it to 1, so that Pillow does not apply it a second time (TIFF).

    Only this entry of the EXIF record is decoded, because cameras and editors often damage others.
    """
    try:
        exif = file.getexif()
    except PILLOW_ERRORS:  # the pixels are usable even if the record is damaged
        exif = file.getexif()  # the second call returns the part that could be read
    with suppress(*PILLOW_ERRORS):
        orientation = exif.get(ORIENTATION)
        exif[ORIENTATION] = 1
        if isinstance(orientation, int) and orientation in TRANSPOSITIONS:
            return orientation
    return 1


def scale_transparent_value(file: Image.Image) -> None:
    """Scales the transparent value of a PNG like its samples, which Pillow converts from 2, 4 or 16 bits to 8."""
    value, tiles = file.info.get("transparency"), getattr(file, "tile", None)
    raw_mode = tiles[0][3] if tiles else None
    if raw_mode in ("L;2", "L;4") and isinstance(value, int):
        file.info["transparency"] = value * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B" and isinstance(value, tuple):
        file.info["transparency"] = tuple(sample >> 8 for sample in value)


def essential_png(data: bytes) -> bytes:
    """Removes the chunks of a PNG that affect neither pixels nor orientation.

    Pillow would refuse an intact image because of a large or damaged text chunk or color profile.
    """
    kept, begin = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while begin + 12 <= len(data):
        (size,), kind = struct.unpack_from(">I", data, begin), data[begin + 4 : begin + 8]
        end = begin + 12 + size
        if end > len(data):
            break
        is_critical = not kind[0] & 0x20
        if is_critical or kind == b"tRNS" or is_sound_record(data[begin + 4 : end]):
            kept.append(data[begin:end])
        begin = end
    return b"".join([*kept, data[begin:]])


def is_sound_record(chunk: bytes) -> bool:
    """Returns whether a PNG chunk (type, data and checksum) may hold the orientation and is intact."""
    is_record = len(chunk) <= MAX_PNG_RECORD and chunk.startswith(PNG_ORIENTATION)
    return is_record and zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB; composites it on white if it has transparency.

    16-bit and 32-bit gray is scaled to 8 bits. For floats, white is the first of 1, 255 and 65535 that no value
    exceeds, or else the largest value.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white = white_value(image)
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // max(image.width, 1))
    for top in range(0, image.height, rows):  # in strips, so that intermediate images stay small
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(strip_to_rgb(strip, white), (0, top))
    return rgb


def white_value(image: Image.Image) -> float | None:
    """Returns the value of white in a mode with more than 8 bits per channel; None for other modes."""
    if image.mode.startswith("I;16"):
        return 65535
    if image.mode not in ("I", "F"):
        return None
    high = float(image.getextrema()[1])  # type: ignore[arg-type]  # one channel
    levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    return next((level for level in levels if high <= level), high if math.isfinite(high) else 1.0)


def strip_to_rgb(image: Image.Image, white: float | None) -> Image.Image:
    """Converts an image to RGB on white; `white` is its `white_value`."""
    if white is not None:
        values = np.asarray(image)
        gray = np.nan_to_num(values.astype(np.float32), posinf=white, neginf=0) * np.float32(255 / white)
        pixels = gray.round().clip(0, 255).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            pixels[values == transparent] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
