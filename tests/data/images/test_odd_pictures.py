"""Pictures as cameras, editors and instruments leave them come out as a viewer shows them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from lightning_mvar.data.images.decoding import decode_image, to_rgb

WIDTH, HEIGHT = 48, 32
COLOR = np.stack(
    [*np.meshgrid(np.arange(WIDTH) * 5, np.arange(HEIGHT) * 8), np.full((HEIGHT, WIDTH), 60)], axis=-1
).astype(np.uint8)
GRAY = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'

Tag = tuple[int, int, int, bytes]  # number, type, count, value


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def raw_png(depth: int, color: int, rows: Iterable[bytes], transparent: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    value = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + value + pixels + chunk(b"IEND", b"")


def exif(tags: list[Tag]) -> bytes:
    """Returns an EXIF record with orientation 6 and further tags, little-endian."""
    entries = sorted([(0x0112, 3, 1, struct.pack("<H", 6)), *tags])
    begin, body, values = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for number, kind, count, value in entries:
        field = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", begin + len(values))
        values += value if len(value) > 4 else b""
        body += struct.pack("<HHI", number, kind, count) + field
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + b"\0" * 4 + values


# Records that Pillow cannot write again, or reads in part.
RECORDS: dict[str, list[Tag]] = {
    "sound": [],
    "two numbers where one is expected": [(0x011A, 5, 2, struct.pack("<IIII", 72, 1, 72, 1))],
    "GPS outside the file": [(0x8825, 4, 1, struct.pack("<I", 99999))],
    "GPS as text": [(0x8825, 2, 8, b"51.5000\0")],
    "software as a fraction": [(0x0131, 5, 1, struct.pack("<II", 5, 1))],
    "width as text": [(0x0100, 2, 4, b"abc\0")],
    "negative model": [(0x0110, 9, 1, struct.pack("<i", -5))],
    "resolution as a signed fraction": [(0x011A, 10, 1, struct.pack("<ii", -5, 1))],
    "zero denominator": [(0x011A, 5, 1, struct.pack("<II", 1, 0)), (0x011B, 10, 1, struct.pack("<ii", -1, 0))],
    "not a number": [(0x0102, 12, 1, struct.pack("<d", float("nan"))), (0x0103, 11, 1, struct.pack("<f", 1e30))],
    "Latin-1": [(0x010E, 2, 6, b"\xff\xfe\x80ab\0")],
    "unknown type": [(0x9101, 99, 1, b"\5")],
    "a value that is too long": [(0x9286, 7, 2**31 - 1, b"\0\0\0\x7f")],
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_does_not_leave_the_picture_on_its_side(kind: str) -> None:
    upright = np.rot90(COLOR, -1)  # orientation 6: turned clockwise to be seen
    for image_format in ("JPEG", "WEBP", "PNG"):
        data = encoded(Image.fromarray(COLOR), image_format, exif=exif(RECORDS[kind]))
        image = decode_image(data)
        assert image.size == (HEIGHT, WIDTH), image_format
        assert np.abs(np.asarray(image).astype(float) - upright).mean() < 8, image_format


def test_the_eight_orientations() -> None:
    image = Image.fromarray(COLOR)
    for orientation, expected in enumerate(
        [
            COLOR,
            COLOR[:, ::-1],
            COLOR[::-1, ::-1],
            COLOR[::-1],
            COLOR.transpose(1, 0, 2),
            np.rot90(COLOR, -1),
            COLOR[::-1, ::-1].transpose(1, 0, 2),
            np.rot90(COLOR),
        ],
        start=1,
    ):
        record = Image.Exif()
        record[0x0112] = orientation
        for image_format in ("PNG", "TIFF"):
            decoded = decode_image(encoded(image, image_format, exif=record))
            np.testing.assert_array_equal(np.asarray(decoded), expected, err_msg=f"{image_format} {orientation}")


@pytest.mark.parametrize("value", [(0x0112, 2, 2, b"6\0"), (0x0112, 3, 1, b"\x09\0"), (0x0112, 3, 1, b"\0\0")])
def test_an_orientation_that_does_not_exist_is_ignored(value: Tag) -> None:
    record = exif([])[:14] + struct.pack("<H", 1) + struct.pack("<HHI", *value[:3]) + value[3].ljust(8, b"\0")
    assert decode_image(encoded(Image.fromarray(COLOR), "JPEG", exif=record)).size == (WIDTH, HEIGHT)


def test_an_orientation_in_xmp_alone_counts() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    image = Image.fromarray(COLOR)
    for data in (encoded(image, "JPEG", xmp=XMP), encoded(image, "PNG", pnginfo=info)):
        assert decode_image(data).size == (HEIGHT, WIDTH)


def big_endian(values: NDArray[np.generic]) -> list[bytes]:
    return [row.astype(">u2").tobytes() for row in values]


LEFT = np.arange(WIDTH) < WIDTH // 2
HIDDEN = np.where(LEFT[None, :, None], np.array([255, 0, 255]), COLOR).astype(np.uint8)  # magenta, to be transparent
ON_WHITE = np.where(LEFT[None, :, None], 255, COLOR)


def gray_on_white(gray: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.where(LEFT[None, :, None], 255, np.repeat(gray[..., None], 3, axis=2))


def test_transparent_pixels_are_white_whatever_color_they_hide() -> None:
    alpha = np.where(LEFT, 0, 255)[None].repeat(HEIGHT, 0).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([HIDDEN, alpha]))
    gray = COLOR[..., 0]
    palette = Image.fromarray(np.where(LEFT, 0, 1)[None].repeat(HEIGHT, 0).astype(np.uint8))
    palette.putpalette([255, 0, 255, 10, 20, 30])
    flat = np.where(LEFT[None, :, None], 255, np.array([10, 20, 30])).repeat(HEIGHT, 0)
    sixteen = (np.where(LEFT, 7, GRAY * 40 + 257)).astype(np.uint16)
    deep = HIDDEN.astype(np.uint16) * 257
    cases = {
        "RGBA": (encoded(rgba, "PNG"), ON_WHITE),
        "RGBA in WebP": (encoded(rgba, "WEBP", lossless=True), ON_WHITE),
        "RGBA in TIFF": (encoded(rgba, "TIFF"), ON_WHITE),
        "LA": (encoded(Image.fromarray(np.dstack([gray, alpha]), "LA"), "PNG"), gray_on_white(gray)),
        "palette": (encoded(palette, "PNG", transparency=0), flat),
        "palette with alpha": (encoded(palette, "PNG", transparency=bytes([0, 255])), flat),
        "palette in GIF": (encoded(palette, "GIF", transparency=0), flat),
        "RGB with a transparent color": (
            raw_png(8, 2, (row.tobytes() for row in HIDDEN), struct.pack(">HHH", 255, 0, 255)),
            ON_WHITE,
        ),
        "16-bit RGB with a transparent color": (
            raw_png(16, 2, big_endian(deep), struct.pack(">HHH", 65535, 0, 65535)),
            ON_WHITE,
        ),
        "16-bit gray with a transparent value": (
            raw_png(16, 0, big_endian(sixteen), struct.pack(">H", 7)),
            gray_on_white(np.round(sixteen / 257)),
        ),
        "16-bit gray with alpha": (
            raw_png(16, 4, big_endian(np.stack([gray, alpha], -1).astype(np.uint16) * 257)),
            gray_on_white(gray),
        ),
        "4-bit gray with a transparent value": (
            raw_png(4, 0, [(b"\x33" * (WIDTH // 4) + b"\x55" * (WIDTH // 4))] * HEIGHT, struct.pack(">H", 3)),
            gray_on_white(np.full((HEIGHT, WIDTH), 0x55)),
        ),
        "1-bit with a transparent value": (
            raw_png(1, 0, [b"\0" * (WIDTH // 16) + b"\xff" * (WIDTH // 16)] * HEIGHT, struct.pack(">H", 0)),
            np.full((HEIGHT, WIDTH, 3), 255),
        ),
    }
    for name, (data, expected) in cases.items():
        np.testing.assert_array_equal(np.asarray(decode_image(data)), expected, err_msg=name)


def test_gray_of_many_bits_is_scaled_and_not_clipped() -> None:
    sixteen = (GRAY * 42).astype(np.uint16)
    unit = (GRAY / GRAY.max()).astype(np.float32)
    cases = {
        "16 bits": (encoded(Image.fromarray(sixteen), "PNG"), sixteen / 257),
        "16 bits in TIFF": (encoded(Image.fromarray(sixteen), "TIFF"), sixteen / 257),
        "32 bits with values of 16": (encoded(Image.fromarray(sixteen.astype(np.int32)), "TIFF"), sixteen / 257),
        "32 bits": (encoded(Image.fromarray((GRAY * 1_000_000).astype(np.int32)), "TIFF"), GRAY * 1e6 * 255 / 2**31),
        "floats to 1": (encoded(Image.fromarray(unit), "TIFF"), unit * 255),
        "floats to 255": (encoded(Image.fromarray(unit * 255), "TIFF"), unit * 255),
        "floats to 65535": (encoded(Image.fromarray(unit * 65535), "TIFF"), unit * 255),
        "floats to 100000": (encoded(Image.fromarray(unit * 100_000), "TIFF"), unit * 255),
    }
    for name, (data, expected) in cases.items():
        pixels = np.asarray(decode_image(data))
        assert (pixels.min(axis=2) == pixels.max(axis=2)).all(), name
        assert np.abs(pixels[..., 0] - expected).max() <= 0.51, name
    broken = np.where(GRAY % 3 == 0, np.nan, unit).astype(np.float32)
    assert np.asarray(decode_image(encoded(Image.fromarray(broken), "TIFF")))[GRAY % 3 == 0].max() == 0


def test_large_pictures_are_converted_in_strips() -> None:
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (1500, 1400, 4), dtype=np.uint8))
    whole = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    assert to_rgb(rgba).tobytes() == whole.tobytes()
