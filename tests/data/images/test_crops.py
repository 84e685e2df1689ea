from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_mvar.data.images.crops import CorruptImageError
from lightning_mvar.data.images.decoding import to_tensor
from lightning_mvar.data.images.examples import collate
from lightning_mvar.data.images.sources import open_images


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


def test_the_crop_is_the_centre_of_the_resized_image(image_folder: Path) -> None:
    with Image.open(image_folder / "b/1.png") as original:
        resized = original.resize((36, 18), Image.Resampling.LANCZOS)  # the shorter side to 1.125 x 16
    expected = torch.from_numpy(np.asarray(resized, dtype=np.float32)[1:17, 10:26]).permute(2, 0, 1) / 127.5 - 1
    image = open_images(str(image_folder), 16)[2].image
    assert image is not None
    torch.testing.assert_close(image, expected)


def test_oblong_crops_keep_as_much_of_the_image_as_possible(image_folder: Path) -> None:
    """A 40 x 20 image is resized to just cover 1.125 times the crop, then random_crop at its centre."""
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
    centred = digits[5].image
    inner = slice(1, -1)
    candidates = [centred.roll((dy, dx), dims=(1, 2))[:, inner, inner] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    crops = [digits.random_crop(5, generator).image for _ in range(60)]
    assert all(image.shape == (3, 32, 32) for image in crops)
    shifts = [
        [torch.equal(image[:, inner, inner], candidate) for candidate in candidates].index(True) for image in crops
    ]
    assert set(shifts) == set(range(9))
