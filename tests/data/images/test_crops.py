from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_mvar.data.images.crops import CorruptImageError
from lightning_mvar.data.images.decoding import to_tensor
from lightning_mvar.data.images.examples import collate
from lightning_mvar.data.images.protocols import CROP_PROTOCOLS, MARGIN, CropProtocol, Resizing
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.errors import InputError


def test_a_folder_gives_classes_in_order_and_square_crops(image_folder: Path) -> None:
    images = open_images(str(image_folder), 16)
    assert images.class_names == ["a", "b"]
    examples = [images[i] for i in range(len(images))]
    assert [example.key for example in examples] == ["a/4.webp", "a/deep/3.jpeg", "b/1.png", "b/2.jpg"]
    assert [example.label for example in examples] == [0, 0, 1, 1]
    batch = collate(examples)
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1


def test_the_crop_is_the_center_of_the_resized_image(image_folder: Path) -> None:
    with Image.open(image_folder / "b/1.png") as original:
        resized = original.resize((36, 18), Image.Resampling.LANCZOS)  # the shorter side to 1.125 x 16
    expected = torch.from_numpy(np.asarray(resized, dtype=np.float32)[1:17, 10:26]).permute(2, 0, 1) / 127.5 - 1
    image = open_images(str(image_folder), 16)[2].image
    assert image is not None
    torch.testing.assert_close(image, expected)


def test_oblong_crops_keep_as_much_of_the_image_as_possible(image_folder: Path) -> None:
    """A 40 x 20 image is resized to just cover 1.125 times the crop, then random_crop at its center."""
    with Image.open(image_folder / "b/1.png") as original:
        for shape, resized, box in (
            ((16, 24), (36, 18), (6, 1, 30, 17)),  # height is the limit
            ((8, 32), (36, 18), (2, 5, 34, 13)),  # width is the limit
        ):
            expected = to_tensor(original.resize(resized, Image.Resampling.LANCZOS).crop(box))
            image = open_images(str(image_folder), shape)[2].image
            assert image is not None
            torch.testing.assert_close(image, expected)
    assert open_images(str(image_folder), (8, 32)).random_crop(2, torch.Generator().manual_seed(0)).image.shape == (
        3,
        8,
        32,
    )


def var_crop(image: Image.Image, side: int, margin: float = 1.125) -> np.ndarray:
    """VAR: the shorter side to `margin` times the crop, Lanczos."""
    shorter = round(margin * side)
    width, height = (round(length * shorter / min(image.size)) for length in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def adm_crop(image: Image.Image, side: int) -> np.ndarray:
    """ADM's `center_crop_arr`."""
    while min(*image.size) >= 2 * side:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = side / min(*image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def torchvision_crop(image: Image.Image, side: int, resample: Image.Resampling) -> np.ndarray:
    """torchvision's `Resize(side)` and `CenterCrop(side)` of PIL images."""
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    pixels = np.array(image.resize(size, resample))
    top, left = (round((length - side) / 2.0) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


PLAIN_CROPS = {
    "var": var_crop,
    "adm": adm_crop,
    "torchvision-bilinear": partial(torchvision_crop, resample=Image.Resampling.BILINEAR),
    "torchvision-bicubic": partial(torchvision_crop, resample=Image.Resampling.BICUBIC),
}


@pytest.mark.parametrize(("protocol", "margin"), [*((name, MARGIN) for name in PLAIN_CROPS), ("var", 1), ("var", 1.3)])
def test_crops_are_those_of_the_published_evaluations(tmp_path: Path, protocol: CropProtocol, margin: float) -> None:
    """Images that are smaller than the crop, a little larger, more than twice and more than four times as large."""
    (tmp_path / "a").mkdir()
    sizes = [(16, 16), (11, 7), (23, 50), (47, 33), (90, 71), (71, 118)]
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
    for number, image in enumerate(images):
        image.save(tmp_path / f"a/{number}.png")
    source = open_images(str(tmp_path), 16, crop=protocol, margin=margin)
    assert source.crop == (protocol if margin == MARGIN else f"var-{margin:.1f}")
    for number, image in enumerate(images):
        pixels = var_crop(image, 16, margin) if protocol == "var" else PLAIN_CROPS[protocol](image, 16)
        expected: Tensor = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)
        torch.testing.assert_close(source[number].image, expected.permute(2, 0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("protocol", CROP_PROTOCOLS)
@pytest.mark.parametrize("shape", [(16, 24), (8, 32)])
def test_every_protocol_covers_oblong_crops(image_folder: Path, protocol: CropProtocol, shape: tuple[int, int]) -> None:
    assert open_images(str(image_folder), shape, crop=protocol)[2].image.shape == (3, *shape)


def test_margin_1_keeps_all_of_a_square_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a/0.png")
    images = open_images(str(tmp_path), 16, margin=1.0)
    for example in (images[0], images.random_crop(0, torch.Generator().manual_seed(0))):
        assert torch.equal(example.image, torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1))


def test_transparent_images_are_composited_on_white_before_they_are_resized(tmp_path: Path) -> None:
    pixels = np.zeros((30, 30, 4), np.uint8)  # transparent black around an opaque red square
    pixels[10:20, 10:20] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    on_white = np.full((30, 30, 3), 255, np.uint8)
    on_white[10:20, 10:20] = (255, 0, 0)
    expected = to_tensor(Image.fromarray(on_white).resize((16, 16), Image.Resampling.LANCZOS))
    assert torch.equal(open_images(str(tmp_path), 16, margin=1.0)[0].image, expected)


def test_embedded_images_are_not_cropped() -> None:
    with pytest.raises(InputError, match=r"digits:test has images of one size.*leave out crop adm"):
        open_images("digits:test", 32, crop="adm")
    with pytest.raises(InputError, match=r"digits:test has images of one size.*leave out crop var and margin 1.0"):
        open_images("digits:test", 32, margin=1.0)


@pytest.mark.parametrize("resizing", [*map(Resizing, CROP_PROTOCOLS), Resizing("var", 1), Resizing("var", 1.0625)])
def test_names_of_crops_can_be_read_back(resizing: Resizing) -> None:
    assert Resizing.parse(str(resizing)) == resizing


@pytest.mark.parametrize("name", ["none", "unknown", "var-", "var-1", "adm-1.0", "var-1.0e", "VAR"])
def test_names_of_other_crops_are_unknown(name: str) -> None:
    assert Resizing.parse(name) is None


@pytest.mark.parametrize(
    ("crop", "margin", "message"),
    [
        ("var", 0.99, r"margin 0.99 is out of range: use 1 \(no margin\) to 4"),
        ("var", float("nan"), "margin nan is out of range"),
        ("var", 5.0, "margin 5.0 is out of range"),
        ("adm", 1.0, "crop adm has no margin: leave out margin 1.0, or use crop var"),
    ],
)
def test_impossible_margins_are_refused(crop: CropProtocol, margin: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Resizing(crop, margin)


def test_random_crops_differ_and_follow_the_generator(image_folder: Path) -> None:
    images = open_images(str(image_folder), 16)
    crops = [images.random_crop(2, torch.Generator().manual_seed(seed)).image for seed in (0, 0, 1, 2)]
    assert torch.equal(crops[0], crops[1])
    assert not (torch.equal(crops[0], crops[2]) and torch.equal(crops[0], crops[3]))


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
@pytest.mark.parametrize("name", ["b/1.png", "b/2.jpg"])
def test_a_corrupt_image_is_named_and_raised_or_skipped(image_folder: Path, name: str, damage: str) -> None:
    path = image_folder / name
    content = path.read_bytes()
    path.write_bytes({"truncate": content[: len(content) // 2], "garbage": b"x" * 200, "empty": b""}[damage])
    index = {"b/1.png": 2, "b/2.jpg": 3}[name]
    with pytest.raises(CorruptImageError, match=f"{name} cannot be decoded"):
        open_images(str(image_folder), 16)[index]
    images = open_images(str(image_folder), 16, on_corrupt="skip")
    batch = collate([images[i] for i in range(4)])
    assert len(batch.images) == len(batch.labels) == len(batch.keys) == 3
    assert len(batch.errors) == 1
    assert name in batch.errors[0]


def test_random_crops_of_digits_are_shifts_by_a_pixel() -> None:
    """Compares the interior with the nine rolled copies of the digit."""
    generator, digits = torch.Generator().manual_seed(0), open_images("digits:test", 32)
    centered = digits[5].image
    inner = slice(1, -1)
    candidates = [centered.roll((dy, dx), dims=(1, 2))[:, inner, inner] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    crops = [digits.random_crop(5, generator).image for _ in range(60)]
    assert all(image.shape == (3, 32, 32) for image in crops)
    shifts = [
        [torch.equal(image[:, inner, inner], candidate) for candidate in candidates].index(True) for image in crops
    ]
    assert set(shifts) == set(range(9))
