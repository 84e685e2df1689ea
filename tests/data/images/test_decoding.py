import numpy as np
import pytest
from imagenet_folder import BROKEN, UNUSUAL, encoded
from PIL import Image

from lightning_mvar.data.builtin.photos import PHOTO_FILES, read_photo
from lightning_mvar.data.images.decoding import UnusableFileError, decode_image


@pytest.fixture(scope="module")
def original() -> Image.Image:
    return Image.fromarray(read_photo(PHOTO_FILES["cat"])[100:140, 200:264])


def mean_error(image: Image.Image, expected: np.ndarray) -> float:
    pixels = np.asarray(image).astype(float)
    assert pixels.shape == expected.shape
    return float(np.abs(pixels - expected).mean())


def test_unusual_formats_decode_to_their_appearance(original: Image.Image) -> None:
    color = np.asarray(original).astype(float)
    gray = np.repeat(np.asarray(original.convert("L")).astype(float)[..., None], 3, axis=2)
    on_white = color.copy()
    on_white[:, original.width // 2 :] = 255
    expected = {
        "cmyk.jpg": (color, 12),
        "gray.jpg": (gray, 6),
        "palette.png": (np.asarray(original.convert("P").convert("RGB")).astype(float), 0),
        "sixteen_bit.png": (gray, 0),
        "half_transparent.png": (on_white, 0),
        "rotated.jpg": (color, 6),
        "tiny.png": (color[:1, :1], 0),
        "modern.webp": (color, 12),
        "actually_png.jpg": (color, 0),
    }
    for name, (pixels, tolerance) in expected.items():
        image = decode_image(UNUSUAL[name](original))
        assert image.mode == "RGB"
        assert mean_error(image, pixels) <= tolerance, name


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_raise(original: Image.Image, name: str) -> None:
    with pytest.raises(UnusableFileError):
        decode_image(BROKEN[name](original))


def test_damaged_exif_is_ignored(original: Image.Image) -> None:
    data = encoded(original, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", quality=95)
    assert mean_error(decode_image(data), np.asarray(original).astype(float)) < 6
