"""Compares patches of the embedded photos with the photos as scikit-image provides them."""

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
    LAYOUT_32,
    LAYOUT_64,
    PHOTOS,
    PHOTOS64,
    BandLayout,
    find_installed_file,
    load_photos_with_margin,
    select_patches,
)
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.errors import InputError

LANCZOS_RADIUS = 3  # filter radius in resized pixels


def locate_patch(image: torch.Tensor, photo: NDArray[np.uint8]) -> tuple[int, int]:
    """Returns (top, left) of an image (3, side, side) in [-1, 1] within a photo (H, W, 3); fails if it is not there."""
    side = image.shape[1]
    pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    for top, left in np.argwhere((photo == pixels[0, 0]).all(axis=2)):
        if np.array_equal(photo[top : top + side, left : left + side], pixels):
            return int(top), int(left)
    raise AssertionError("the image is not part of the photo")


@pytest.fixture(scope="module")
def gravel() -> NDArray[np.uint8]:
    """The photo of gravel, reduced from 512 x 512 to 432 x 432."""
    from skimage.data import gravel

    return np.asarray(Image.fromarray(gravel()).resize((432, 432), Image.Resampling.LANCZOS).convert("RGB"))


@pytest.mark.parametrize("photos", [PHOTOS, PHOTOS64], ids=lambda photos: photos.name)
def test_each_photo_has_the_same_number_of_distinct_textured_patches(photos: EmbeddedSet) -> None:
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
        positions = {locate_patch(image, gravel) for image in images[labels == label]}
        assert len(positions) == len(images) // 10
    with pytest.raises(AssertionError, match="not part"):
        locate_patch(images[labels != label][0], gravel)


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((432, 432), LAYOUT_32),
        ((303, 384), LAYOUT_32),
        ((330, 288), LAYOUT_32),
        ((432, 432), LAYOUT_64),
        ((303, 384), LAYOUT_64),
    ],
)
def test_train_and_test_share_no_pixel_even_before_resizing(size: tuple[int, int], layout: BandLayout) -> None:
    """Each pixel of the photo has a unique color, which reveals its column; margins are included."""
    height, width = size
    colors = (
        np.arange(height * width) * 0x9E3779 % 2**24
    )  # an odd factor: all colors differ, those of neighbors strongly
    photo = np.stack([colors >> shift & 255 for shift in (0, 8, 16)], axis=1).astype(np.uint8)
    columns = {}
    for split in ("train", "test"):
        pixels = select_patches(photo.reshape(height, width, 3), split, layout).reshape(-1, 3).astype(int)
        inverse = pow(0x9E3779, -1, 2**24)
        indices = (pixels @ [1, 2**8, 2**16]) * inverse % 2**24
        columns[split] = np.unique(indices % width)
    gap = np.abs(columns["train"][:, None] - columns["test"]).min()
    assert gap > 2 * LANCZOS_RADIUS
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
    top, left = locate_patch(example.image, gravel)
    positions = [locate_patch(photos.random_crop(index, generator).image, gravel) for _ in range(150)]
    for axis, center in enumerate((top, left)):
        assert {position[axis] - center for position in positions} == set(range(-4, 5))


def test_photo_patches_are_deterministic() -> None:
    images, labels = load_photos_with_margin("test")
    load_photos_with_margin.cache_clear()
    images_again, labels_again = load_photos_with_margin("test")
    assert images is not images_again
    assert torch.equal(images, images_again)
    assert torch.equal(labels, labels_again)


def test_wrong_splits_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="photos have the splits train and test, not 'validation'"):
        open_images("photos:validation", 32)
    with pytest.raises(InputError, match="photos:test are 32 x 32 images"):
        open_images("photos:test", 64)
    with pytest.raises(InputError, match="photos64:test are 64 x 64 images"):
        open_images("photos64:test", 32)


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"skimage/data/nowhere\.png .* pip install .*scikit-learn"):
        find_installed_file("skimage/data/nowhere.png")
    assert find_installed_file("skimage/data/brick.png").is_file()
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"skimage/data/brick\.png .* pip install .*scikit-learn"):
        find_installed_file("skimage/data/brick.png")
