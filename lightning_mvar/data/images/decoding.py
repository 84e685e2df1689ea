"""The one way to open a picture: raster formats only, bounded, upright, 8-bit RGB on white; and pictures as tensors."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from stat import S_ISREG

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_mvar.errors import InputError

SUFFIXES_BY_FORMAT = {  # Pillow reads these without starting another program, unlike EPS, PDF or WMF
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
MAX_BYTES = 2**30  # size of a file
STRIP_PIXELS = 2**20  # pixels converted to RGB at once
IMAGE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError),
    *(
        TypeError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
        RuntimeError,
    ),  # Pillow's plugins, on damaged headers
)

ORIENTATION = 0x0112  # of EXIF
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

# Pillow warns of metadata that are not used here, and of sizes that are checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnusableFileError(ValueError):
    """The content of an image file is missing or too large."""


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image file as `decode_image` does.

    Raises:
        InputError: if the file does not exist, is not a regular file, or cannot be decoded.
    """
    try:
        return decode_image(read_file(Path(path)), max_pixels)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except IMAGE_ERRORS as error:
        raise InputError(f"{path} cannot be decoded ({describe(error)})") from error


def read_file(path: Path) -> bytes:
    """Returns the bytes of a regular file: others, such as a named pipe, might never end.

    Raises:
        OSError: if it cannot be read.
        UnusableFileError: if it is not a regular file, or has more than `MAX_BYTES`.
    """
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise UnusableFileError("it is not a regular file")
    check_bytes(status.st_size)
    return path.read_bytes()


def check_bytes(size: int) -> None:
    """Raises UnusableFileError if an image file is larger than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise UnusableFileError(f"it has {size} bytes, more than {MAX_BYTES}")


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to upright 8-bit RGB; see `decode_upright` and `to_rgb`.

    Raises:
        Exception: one of `IMAGE_ERRORS`, if the file cannot be decoded.
    """
    return to_rgb(decode_upright(data, max_pixels))


def decode_upright(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the first frame of an image file in its own mode, turned as its EXIF orientation says.

    Args:
        data: content of a file in one of `FORMATS`.
        max_pixels: images of more pixels are refused before they are decoded.

    Raises:
        Exception: one of `IMAGE_ERRORS`, if the file cannot be decoded.
    """
    try:
        file = Image.open(BytesIO(essential_png(data) if data.startswith(PNG_SIGNATURE) else data), formats=FORMATS)
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise OSError(f"it is empty, damaged or none of {', '.join(FORMATS)}") from error
    with file:
        if file.width * file.height > max_pixels:
            raise Image.DecompressionBombError(f"it has {file.width} x {file.height} pixels, more than {max_pixels}")
        scale_transparent_value(file)
        if file.format == "PNG":
            file.load()  # an EXIF record may follow the pixels
        orientation = pop_orientation(file)
        file.load()
        transposition = TRANSPOSITIONS.get(orientation)
        return file if transposition is None else file.transpose(transposition)


def pop_orientation(file: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, and sets it to 1, so that Pillow does not apply it as well (to TIFF).

    Only this entry of the EXIF record is decoded, because cameras and editors leave many others damaged.
    """
    with suppress(*IMAGE_ERRORS):  # the pixels are usable even if the record is damaged
        file.getexif()
    exif = file.getexif()  # what could be read of it
    with suppress(*IMAGE_ERRORS):
        orientation = exif.get(ORIENTATION)
        exif[ORIENTATION] = 1
        if isinstance(orientation, int) and orientation in TRANSPOSITIONS:
            return orientation
    return 1


def scale_transparent_value(file: Image.Image) -> None:
    """Scales the transparent value of a PNG like its samples, which Pillow expands from 2, 4 or 16 bits to 8."""
    value, tiles = file.info.get("transparency"), getattr(file, "tile", None)
    raw_mode = tiles[0][3] if tiles else None
    if raw_mode in ("L;2", "L;4") and isinstance(value, int):
        file.info["transparency"] = value * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B" and isinstance(value, tuple):
        file.info["transparency"] = tuple(sample >> 8 for sample in value)


def essential_png(data: bytes) -> bytes:
    """Returns a PNG without the chunks that affect neither pixels nor orientation.

    Pillow would refuse sound pixels for a large text or colour profile, or for a wrong checksum of one.
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
    """Returns whether a PNG chunk, from its type to its checksum, may hold the orientation and is intact."""
    is_record = len(chunk) <= MAX_PNG_RECORD and chunk.startswith(PNG_ORIENTATION)
    return is_record and zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, and composites it on white if it is transparent.

    16-bit and 32-bit grey is scaled to 8 bits; of floats, white is the first of 1, 255, 65535 that no value exceeds,
    else the largest value.
    """
    white = white_value(image)
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // max(image.width, 1))
    for top in range(0, image.height, rows):  # in strips, so that intermediate images stay small
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(strip_to_rgb(strip, white), (0, top))
    return rgb


def white_value(image: Image.Image) -> float | None:
    """Returns the value of white in a mode of more than 8 bits per channel; None for other modes."""
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
        grey = np.nan_to_num(values.astype(np.float32), posinf=white, neginf=0) * np.float32(255 / white)
        pixels = grey.round().clip(0, 255).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            pixels[values == transparent] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def describe(error: BaseException) -> str:
    """Returns the reason of a failed decoding on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
