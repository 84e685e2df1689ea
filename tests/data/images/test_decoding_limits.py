"""Only pictures are opened, none is a program, and none takes more memory than its pixels."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lightning_mvar.data.images import decoding
from lightning_mvar.data.images.decoding import (
    FORMATS,
    TooManyPixelsError,
    UnusableFileError,
    decode_image,
    read_image,
    to_rgb,
)
from lightning_mvar.errors import InputError

SIDE = 40


def gradient() -> Image.Image:
    y, x = np.mgrid[0:24, 0:SIDE]
    return Image.fromarray(np.stack([x * 6, y * 10, x + y], -1).astype(np.uint8))


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, extra: bytes) -> bytes:
    """Inserts a chunk behind the header of a PNG."""
    return png[:33] + extra + png[33:]


@pytest.mark.parametrize("image_format", ["EPS", "PDF"])
def test_a_program_called_png_is_refused_and_starts_nothing(
    image_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"{args} was started")

    for name in ("Popen", "run", "check_call", "check_output", "call"):
        monkeypatch.setattr(subprocess, name, refuse)
    (tmp_path / "a.png").write_bytes(encoded(gradient(), image_format))
    with pytest.raises(InputError, match=r"a\.png cannot be decoded \(it is empty, damaged or not one of PNG, JPEG"):
        read_image(tmp_path / "a.png")


def test_the_formats_are_raster_formats_that_pillow_reads_itself() -> None:
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"} <= set(FORMATS)
    assert not {"EPS", "PDF", "PS", "WMF", "EMF", "GBR", "FPX", "MIC"} & set(FORMATS)


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_is_read(image_format: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(gradient(), image_format))
    error = np.asarray(read_image(tmp_path / "a.png")).astype(float) - np.asarray(gradient())
    assert np.abs(error).mean() < 12


def test_a_fifo_a_folder_and_a_missing_file_are_told_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, message in {
        "pipe.png": "it is not a regular file",
        "folder.png": "it is not a regular file",
        "nowhere.png": "does not exist",
    }.items():
        with pytest.raises(InputError, match=message):
            read_image(tmp_path / name)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    data = encoded(Image.new("1", (4000, 4000)), "PNG")
    with pytest.raises(TooManyPixelsError, match="4000 x 4000 pixels, more than 15000000"):
        decode_image(data, max_pixels=15_000_000)
    assert decode_image(data, max_pixels=16_000_000).size == (4000, 4000)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
        chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000),
        chunk(b"iCCP", b"p\0\0" + zlib.compress(b"x" * 3_000_000)),
        chunk(b"tEXt", b"a\0b")[:-1] + b"?",
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        chunk(b"eXIf", b"x" * 3_000_000),
        chunk(b"gAMA", b""),
        chunk(b"pHYs", b"1"),
    ],
    ids=["zTXt", "iTXt", "tEXt", "iCCP", "checksum", "exif", "long_exif", "gamma", "physical"],
)
def test_a_large_or_damaged_record_does_not_hide_sound_pixels(extra: bytes) -> None:
    png = encoded(gradient(), "PNG")
    assert decode_image(with_chunk(png, extra)).tobytes() == decode_image(png).tobytes()


def test_only_the_first_frame_of_an_animation_is_decoded() -> None:
    frames = [Image.fromarray(np.roll(np.asarray(gradient()), 8 * i, 1)) for i in range(40)]
    for image_format in ("PNG", "TIFF", "GIF", "WEBP"):
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
        first = np.asarray(decode_image(encoded(frames[0], image_format))).astype(float)
        assert np.abs(np.asarray(decode_image(data)) - first).mean() < 8, image_format


def test_many_small_changes_of_a_file_raise_known_errors_only() -> None:
    rng = np.random.default_rng(0)
    files = [np.frombuffer(encoded(gradient(), name), np.uint8) for name in FORMATS]
    for _ in range(600):
        data = files[rng.integers(len(files))].copy()
        data[rng.integers(0, min(len(data), 400), 3)] = rng.choice([0, 1, 127, 255], 3)
        try:
            assert decode_image(data.tobytes(), max_pixels=100_000).mode == "RGB"
        except UnusableFileError:
            continue


@pytest.mark.parametrize("error", [IndexError, RuntimeError, MemoryError])
def test_an_error_of_our_own_is_no_damage_of_the_file(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    (tmp_path / "a.png").write_bytes(encoded(gradient(), "PNG"))
    for name in ("essential_png", "scale_transparent_value", "to_rgb"):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, name, fail)
            with pytest.raises(error):
                read_image(tmp_path / "a.png")


def test_an_rgb_image_is_not_converted_again() -> None:
    image = gradient()
    assert to_rgb(image) is image


def test_decoded_images_hold_no_metadata() -> None:
    text = PngInfo()
    text.add_text("place", "home")
    data = (
        encoded(gradient(), "JPEG", icc_profile=b"profile", comment=b"home"),
        encoded(gradient(), "PNG", pnginfo=text),
    )
    assert [decode_image(file).info for file in data] == [{}, {}]


def test_warnings_of_pillow_are_silenced_while_it_decodes_only() -> None:
    record = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x010E, 2, 100, 1000)  # a text outside of the record
    data = encoded(gradient(), "JPEG", exif=record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(data)
    program = "import warnings, lightning_mvar.data.images.decoding; print([f for f in warnings.filters if f[3]])"
    filters = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "PIL" not in filters
