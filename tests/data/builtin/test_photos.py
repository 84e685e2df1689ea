"""Patches of the embedded photos, against the photos as scikit-image itself hands them out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from lightning_mvar.data.builtin.base import EmbeddedSet
from lightning_mvar.data.builtin.photos import (
    LARGE,
    PHOTOS,
    PHOTOS64,
    SMALL,
    Layout,
    chosen_patches,
    installed,
    load_wide_photos,
)
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.errors import InputError

LANCZOS_REACH = 3  # a resized pixel is a mixture of what lay up to so many resized pixels away


def place_of(image: torch.Tensor, photo: NDArray[np.uint8]) -> tuple[int, int]:
    """Where an image (3, side, side) in [-1, 1] lies in a photo (H, W, 3); fails if it does not."""
    side = image.shape[1]
    pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    for top, left in np.argwhere((photo == pixels[0, 0]).all(axis=2)):
        if np.array_equal(photo[top : top + side, left : left + side], pixels):
            return int(top), int(left)
    raise AssertionError("the image is no part of the photo")


@pytest.fixture(scope="module")
def gravel() -> NDArray[np.uint8]:
    """The photo of gravel, reduced from 512 x 512 to 432 x 432."""
    from skimage.data import gravel

    return np.asarray(Image.fromarray(gravel()).resize((432, 432), Image.Resampling.LANCZOS).convert("RGB"))


@pytest.mark.parametrize("photos", [PHOTOS, PHOTOS64], ids=lambda photos: photos.name)
def test_every_photo_has_the_same_number_of_patches_in_range(photos: EmbeddedSet) -> None:
    for split, count in (("train", 200), ("test", 45)):
        images, labels = photos.load(split)
        assert images.shape == (10 * count, 3, *2 * [photos.resolution])
        assert images.dtype == torch.float32
        assert labels.bincount().tolist() == [count] * 10
        assert -1 <= images.min() < -0.99 < 0.99 < images.max() <= 1
        assert (images.mean(dim=1) / 2).std(dim=(1, 2)).min() > 0.039
        assert len(images.unique(dim=0)) == len(images)


@pytest.mark.parametrize("photos", [PHOTOS, PHOTOS64], ids=lambda photos: photos.name)
def test_images_are_parts_of_their_photo(photos: EmbeddedSet, gravel: NDArray[np.uint8]) -> None:
    label = PHOTOS.class_names.index("gravel")
    for split in ("train", "test"):
        images, labels = photos.load(split)
        places = {place_of(image, gravel) for image in images[labels == label]}
        assert len(places) == len(images) // 10
    with pytest.raises(AssertionError, match="no part"):
        place_of(images[labels != label][0], gravel)


@pytest.mark.parametrize(
    ("size", "layout"),
    [((432, 432), SMALL), ((303, 384), SMALL), ((330, 288), SMALL), ((432, 432), LARGE), ((303, 384), LARGE)],
)
def test_train_and_test_share_no_pixel_of_a_photo_nor_what_resizing_mixed(
    size: tuple[int, int], layout: Layout
) -> None:
    """On a picture whose every pixel has a colour of its own, which tells where it was; margins included."""
    height, width = size
    colours = np.arange(height * width) * 0x9E3779 % 2**24  # an odd factor: all differ, neighbours by much
    picture = np.stack([colours >> shift & 255 for shift in (0, 8, 16)], axis=1).astype(np.uint8)
    columns = {}
    for split in ("train", "test"):
        seen = chosen_patches(picture.reshape(height, width, 3), split, layout).reshape(-1, 3).astype(int)
        inverse = pow(0x9E3779, -1, 2**24)
        numbers = (seen @ [1, 2**8, 2**16]) * inverse % 2**24
        columns[split] = np.unique(numbers % width)
    apart = np.abs(columns["train"][:, None] - columns["test"]).min()
    assert apart > 2 * LANCZOS_REACH
    assert len(columns["train"]) > 0.4 * width


def test_random_crops_move_by_up_to_four_pixels_of_the_photo(gravel: NDArray[np.uint8]) -> None:
    photos, generator = open_images("photos:train", 32), torch.Generator().manual_seed(0)
    index = PHOTOS.class_names.index("gravel")
    example = photos[index]
    assert (example.key, example.label, photos.class_names[example.label]) == (
        f"photos/train/{index:04d}",
        index,
        "gravel",
    )
    top, left = place_of(example.image, gravel)
    places = [place_of(photos.cropped(index, generator).image, gravel) for _ in range(150)]
    for axis, centre in enumerate((top, left)):
        assert {place[axis] - centre for place in places} == set(range(-4, 5))


def test_photos_are_read_the_same_every_time() -> None:
    before, labels = load_wide_photos("test")
    load_wide_photos.cache_clear()
    again, labels_again = load_wide_photos("test")
    assert before is not again
    assert torch.equal(before, again)
    assert torch.equal(labels, labels_again)


def test_wrong_splits_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="photos have the splits train and test, not 'val'"):
        open_images("photos:val", 32)
    with pytest.raises(InputError, match="photos:test are 32 x 32"):
        open_images("photos:test", 64)
    with pytest.raises(InputError, match="photos64:test are 64 x 64"):
        open_images("photos64:test", 32)


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"skimage/data/nowhere\.png .* pip install 'lightning-mvar\[demo\]'"):
        installed("skimage/data/nowhere.png")
    assert installed("skimage/data/brick.png").is_file()
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"skimage/data/brick\.png .* pip install 'lightning-mvar\[demo\]'"):
        installed("skimage/data/brick.png")
