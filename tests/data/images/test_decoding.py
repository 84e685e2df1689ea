import numpy as np
import pytest
from imagenet_folder import BROKEN, ODD, encoded
from PIL import Image

from lightning_mvar.data.builtin.photos import FILES, read_photo
from lightning_mvar.data.images.decoding import IMAGE_ERRORS, decode_image


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(read_photo(FILES["cat"])[100:140, 200:264])


def worst(image: Image.Image, expected: np.ndarray) -> float:
    pixels = np.asarray(image).astype(float)
    assert pixels.shape == expected.shape
    return float(np.abs(pixels - expected).mean())


def test_odd_pictures_come_out_as_they_look(picture: Image.Image) -> None:
    looks = np.asarray(picture).astype(float)
    grey = np.repeat(np.asarray(picture.convert("L")).astype(float)[..., None], 3, axis=2)
    on_white = looks.copy()
    on_white[:, picture.width // 2 :] = 255
    expected = {
        "cmyk.jpg": (looks, 12),
        "grey.jpg": (grey, 6),
        "palette.png": (np.asarray(picture.convert("P").convert("RGB")).astype(float), 0),
        "sixteen_bit.png": (grey, 0),
        "half_clear.png": (on_white, 0),
        "rotated.jpg": (looks, 6),
        "tiny.png": (looks[:1, :1], 0),
        "modern.webp": (looks, 12),
        "png_in_truth.jpg": (looks, 0),
    }
    for name, (pixels, tolerance) in expected.items():
        image = decode_image(ODD[name](picture))
        assert image.mode == "RGB"
        assert worst(image, pixels) <= tolerance, name


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_decoded_says_so(picture: Image.Image, name: str) -> None:
    with pytest.raises(IMAGE_ERRORS):
        decode_image(BROKEN[name](picture))


def test_a_damaged_note_of_the_camera_leaves_the_picture(picture: Image.Image) -> None:
    data = encoded(picture, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", quality=95)
    assert worst(decode_image(data), np.asarray(picture).astype(float)) < 6
