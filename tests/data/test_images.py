from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_mvar.data.digits import load_digits
from lightning_mvar.data.images import CorruptImageError, Views, collate, open_images, to_tensor
from lightning_mvar.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 40 x 20 pictures, every suffix, one of them in a folder of its own."""
    rng = np.random.default_rng(0)
    for name in ("b/1.png", "b/2.jpg", "a/deep/3.jpeg", "a/4.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "a/notes.txt").write_text("not an image")
    return tmp_path


def test_digits_are_a_fixed_stratified_split_in_range() -> None:
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    assert (train.shape, test.shape) == ((1347, 3, 32, 32), (450, 3, 32, 32))
    assert train.min() == -1
    assert train.max() == 1
    shares = [torch.bincount(labels, minlength=10) / len(labels) for labels in (train_labels, test_labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.003
    assert not (train[:, None, 0].flatten(2) == test[None, :60, 0].flatten(2)).all(dim=2).any()


def test_digits_shrunk_back_are_the_scans() -> None:
    from sklearn.datasets import load_digits as load_scans

    scans = torch.tensor(load_scans().images / 16, dtype=torch.float32).flatten(1)
    images, _ = load_digits("test")
    small = torch.nn.functional.adaptive_avg_pool2d(images[:20, 0], 8).flatten(1) / 2 + 0.5
    nearest = torch.cdist(small, scans).min(dim=1).values / 8  # root mean square over the 64 pixels
    assert nearest.max() < 0.1


def test_a_folder_gives_classes_in_order_and_square_crops(folder: Path) -> None:
    images = open_images(str(folder), 16)
    assert images.class_names == ["a", "b"]
    examples = [images[i] for i in range(len(images))]
    assert [example.key for example in examples] == ["a/4.webp", "a/deep/3.jpeg", "b/1.png", "b/2.jpg"]
    assert [example.label for example in examples] == [0, 0, 1, 1]
    batch = collate(examples)
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1


def test_the_crop_is_the_centre_of_the_resized_picture(folder: Path) -> None:
    with Image.open(folder / "b/1.png") as picture:
        resized = picture.resize((36, 18), Image.Resampling.LANCZOS)  # the shorter side to 1.125 x 16
    expected = torch.from_numpy(np.asarray(resized, dtype=np.float32)[1:17, 10:26]).permute(2, 0, 1) / 127.5 - 1
    image = open_images(str(folder), 16)[2].image
    assert image is not None
    torch.testing.assert_close(image, expected)


def test_a_crop_of_another_shape_keeps_as_much_as_it_can(folder: Path) -> None:
    """Of 40 x 20 pixels, resized until they cover 1.125 times the crop, the middle."""
    with Image.open(folder / "b/1.png") as picture:
        for shape, resized, box in (
            ((16, 24), (36, 18), (6, 1, 30, 17)),  # as high as needed, wider
            ((8, 32), (36, 18), (2, 5, 34, 13)),  # as wide as needed, higher
        ):
            expected = to_tensor(picture.resize(resized, Image.Resampling.LANCZOS).crop(box))
            image = open_images(str(folder), shape)[2].image
            assert image is not None
            torch.testing.assert_close(image, expected)
    assert open_images(str(folder), (8, 32)).cropped(2, torch.Generator().manual_seed(0)).image.shape == (3, 8, 32)


def test_random_crops_differ_and_follow_the_generator(folder: Path) -> None:
    images = open_images(str(folder), 16)
    crops = [images.cropped(2, torch.Generator().manual_seed(seed)).image for seed in (0, 0, 1, 2)]
    assert torch.equal(crops[0], crops[1])
    assert not (torch.equal(crops[0], crops[2]) and torch.equal(crops[0], crops[3]))


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
@pytest.mark.parametrize("name", ["b/1.png", "b/2.jpg"])
def test_a_corrupt_image_is_named_and_raised_or_skipped(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes({"truncate": content[: len(content) // 2], "garbage": b"x" * 200, "empty": b""}[damage])
    index = {"b/1.png": 2, "b/2.jpg": 3}[name]
    with pytest.raises(CorruptImageError, match=f"{name} cannot be decoded"):
        open_images(str(folder), 16)[index]
    images = open_images(str(folder), 16, on_corrupt="skip")
    batch = collate([images[i] for i in range(4)])
    assert len(batch.images) == len(batch.labels) == len(batch.keys) == 3
    assert len(batch.errors) == 1
    assert name in batch.errors[0]


def test_missing_and_empty_folders_and_wrong_digits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_images(str(tmp_path / "nowhere"), 16)
    with pytest.raises(InputError, match="no images under"):
        open_images(str(tmp_path), 16)
    with pytest.raises(InputError, match="digits have the splits train and test, not 'val'"):
        open_images("digits:val", 32)
    with pytest.raises(InputError, match="32 x 32"):
        open_images("digits:test", 64)


def test_random_crops_of_digits_are_shifts_by_a_pixel() -> None:
    """The nine shifts of a digit, written out by rolling; rolled edges are replaced by the image's own."""
    generator, digits = torch.Generator().manual_seed(0), open_images("digits:test", 32)
    whole = digits[5].image
    inner = slice(1, -1)
    candidates = [whole.roll((dy, dx), dims=(1, 2))[:, inner, inner] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    drawn = [digits.cropped(5, generator).image for _ in range(60)]
    assert all(image.shape == (3, 32, 32) for image in drawn)
    found = [
        [torch.equal(image[:, inner, inner], candidate) for candidate in candidates].index(True) for image in drawn
    ]
    assert set(found) == set(range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_drawn_from_seed_and_index_alone(folder: Path, workers: int) -> None:
    source = open_images(str(folder), 16)
    views = Views(source, 3, seed=1)
    assert len(views) == 12
    loader = torch.utils.data.DataLoader(views, batch_size=5, num_workers=workers, collate_fn=collate)
    batches = list(loader)
    images = torch.cat([batch.images for batch in batches])
    assert [key for batch in batches for key in batch.keys][:4] == [
        "a/4.webp#0",
        "a/4.webp#1",
        "a/4.webp#2",
        "a/deep/3.jpeg#0",
    ]
    assert all(torch.equal(views[i].image, images[i]) for i in reversed(range(12)))
    assert not all(torch.equal(images[3 * i], images[3 * i + 1]) for i in range(4))
    assert not torch.equal(images, torch.stack([Views(source, 3, seed=2)[i].image for i in range(12)]))
    before = torch.random.get_rng_state()
    assert views[0].key == "a/4.webp#0"
    assert torch.equal(torch.random.get_rng_state(), before)
