"""Readers of samples: npz with and without labels, folders of PNG files with and without classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_mvar.errors import InputError
from lightning_mvar.sampling.readers import open_samples


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)


def write_pngs(root: Path, pixels: np.ndarray, folders: list[str]) -> None:
    for i, (image, folder) in enumerate(zip(pixels, folders, strict=True)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / folder / f"{i:06d}.png")


def test_labels_and_metadata_of_an_npz_are_optional(tmp_path: Path, pixels: np.ndarray) -> None:
    np.savez(tmp_path / "foreign.npz", pixels)
    foreign = open_samples(tmp_path / "foreign.npz")
    assert (len(foreign), foreign.shape, foreign.metadata, foreign.labels(["a"])) == (6, (8, 8), {}, None)
    np.savez(tmp_path / "ours.npz", arr_0=pixels, arr_1=np.arange(6), about=np.array(json.dumps({"seed": 3})))
    ours = open_samples(tmp_path / "ours.npz")
    assert (ours.metadata, ours.labels([])) == ({"seed": 3}, [0, 1, 2, 3, 4, 5])
    for i in range(6):
        assert (ours.pixels(i) == pixels[i]).all()
        np.testing.assert_allclose((ours[i].image.permute(1, 2, 0) + 1) * 127.5, pixels[i], atol=1e-4)


def test_a_folder_is_read_in_the_order_of_file_names_across_class_folders(tmp_path: Path, pixels: np.ndarray) -> None:
    write_pngs(tmp_path / "flat", pixels, [""] * 6)
    write_pngs(tmp_path / "classes", pixels, ["10", "9", "10", "1", "1", "9"])
    for name in ("flat", "classes"):
        samples = open_samples(tmp_path / name)
        assert (np.stack([samples.pixels(i) for i in range(len(samples))]) == pixels).all()
    assert samples.labels(["1", "9", "10"]) == [2, 1, 2, 0, 0, 1]
    assert samples.labels(["1", "9"]) is None


def test_numbers_sort_numerically_and_unfinished_files_are_ignored(tmp_path: Path, pixels: np.ndarray) -> None:
    for image, name in zip(pixels, ["999999", "1000000", ".000000.7.tmp"], strict=False):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    samples = open_samples(tmp_path)
    assert [path.stem for path in samples.files] == ["999999", "1000000"]


def test_other_files_are_refused_by_name(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"nowhere\.npz does not exist; write it with `lightning-mvar sample --out"):
        open_samples(tmp_path / "nowhere.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no images under .*empty: expected files that end in .png, .jpg"):
        open_samples(tmp_path / "empty")
    for array, description in (
        (pixels / 255, "float64 6 x 8 x 8 x 3"),
        (pixels[0], "uint8 8 x 8 x 3"),
        (pixels.transpose(0, 3, 1, 2), "uint8 6 x 3 x 8 x 8"),
        (pixels[..., :2], "uint8 6 x 8 x 8 x 2"),
    ):
        np.savez(tmp_path / "a.npz", arr_0=array)
        with pytest.raises(InputError, match=f"arr_0 must be uint8 N x H x W x 3, got {description}"):
            open_samples(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=pixels)
    with pytest.raises(InputError, match=r"a\.npz has no array arr_0; it holds images"):
        open_samples(tmp_path / "a.npz")
    not_flat = "as a JSON object of numbers and strings"
    for metadata, message in (("{", "damaged"), ("[1]", not_flat), ('{"a": {}}', not_flat)):
        np.savez(tmp_path / "a.npz", arr_0=pixels, about=np.array(metadata))
        with pytest.raises(InputError, match=message):
            open_samples(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=np.arange(5))
    with pytest.raises(InputError, match="arr_1 must be the 6 classes of arr_0, got int64 5"):
        open_samples(tmp_path / "a.npz")


def test_errors_name_damaged_or_unsupported_images(tmp_path: Path, pixels: np.ndarray) -> None:
    write_pngs(tmp_path, pixels, [""] * 6)
    Image.new("RGB", (9, 9)).save(tmp_path / "000003.png")
    (tmp_path / "000004.png").write_bytes((tmp_path / "000005.png").read_bytes()[:60])
    Image.fromarray(pixels[1].astype(np.uint16)[..., 0] * 256).save(tmp_path / "000001.png")
    Image.fromarray(pixels[2]).convert("RGBA").save(tmp_path / "000002.png")
    samples = open_samples(tmp_path)
    for number, mode in ((1, "I;16"), (2, "RGBA")):
        with pytest.raises(InputError, match=f"00000{number}.png has mode {mode}: samples have 8 bits per channel"):
            samples.pixels(number)
    with pytest.raises(InputError, match=r"000003\.png is 9 x 9, the others are 8 x 8"):
        samples.pixels(3)
    with pytest.raises(InputError, match=r"000004\.png cannot be decoded .*: remove it and draw it again"):
        samples.pixels(4)
    Image.new("RGB", (9, 8)).save(tmp_path / "000000.png")
    with pytest.raises(InputError, match=r"000000\.png is 8 x 9 \(height x width\), the others are 8 x 8"):
        open_samples(tmp_path).pixels(0)


@pytest.mark.parametrize("folder", ["", "3"])
def test_pictures_of_every_format_count_and_what_is_left_out_is_told(
    tmp_path: Path, pixels: np.ndarray, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / folder
    root.mkdir(exist_ok=True)
    for i, (image, suffix) in enumerate(zip(pixels, ["png", "PNG", "jpg", "JPEG", "webp", "bmp"], strict=True)):
        Image.fromarray(image).save(root / f"{i:06d}.{suffix}")
    samples = open_samples(tmp_path)
    assert [path.stem for path in samples.files] == [f"{i:06d}" for i in range(6)]
    assert np.abs(samples.pixels(5).astype(int) - pixels[5]).max() == 0
    assert not caplog.messages
    for name in (".ipynb_checkpoints/000000-checkpoint.png", "__MACOSX/000000.png", "@eaDir/000000.jpg"):
        (root / name).parent.mkdir()
        Image.fromarray(pixels[0]).save(root / name)
    (root / "notes.txt").write_text("not an image")
    (root / ".000000.host.tmp.png").write_bytes(b"unfinished")
    (tmp_path / "sampling.json").write_text("{}")
    (tmp_path / ".lock").write_text("sample")
    assert len(open_samples(tmp_path)) == 6
    assert len(open_samples(tmp_path)) == 6
    (message,) = caplog.messages
    assert "left out hidden or system files or folders (4, such as" in message
    assert "files of other types (1, such as" in message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["3/0.png", "3/1.png", "grid.png"],
            r"grid\.png is next to class folders: put all samples in one folder",
        ),
        (["0.png", "1.png", "old/0.png"], r"old/0\.png is next to class folders"),
        (["3/0.png", "3/a/0.png", "3/1.png"], r"3/a/0\.png is next to class folders"),
        (["a/3/0.png", "b/3/1.png"], r"a/3 and .*b/3 have the same name: score each set by itself"),
        (["3/0.png", "3/0.JPG", "4/0.png"], r"3/0\.(png|JPG) and .*3/0\.(png|JPG) may be the same sample"),
    ],
)
def test_pictures_that_may_be_no_samples_are_refused_by_name(
    tmp_path: Path, pixels: np.ndarray, names: list[str], message: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(tmp_path / name)
    with pytest.raises(InputError, match=message):
        open_samples(tmp_path)


def test_a_picture_of_another_size_is_named_even_if_it_is_the_first(tmp_path: Path, pixels: np.ndarray) -> None:
    write_pngs(tmp_path, pixels, [""] * 6)
    Image.new("RGB", (50, 20)).save(tmp_path / "grid.png")
    samples = open_samples(tmp_path)
    assert samples.shape == (8, 8)
    with pytest.raises(InputError, match=r"grid\.png is 20 x 50 \(height x width\), the others are 8 x 8"):
        samples.pixels(samples.files.index(tmp_path / "grid.png"))


@pytest.mark.parametrize(
    "record", [b"\xff\xfe", b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a": 1, "a": 2}', b"x" * 2**21]
)
def test_a_damaged_record_of_a_folder_is_named(tmp_path: Path, pixels: np.ndarray, record: bytes) -> None:
    write_pngs(tmp_path, pixels, ["3"] * 6)
    (tmp_path / "sampling.json").write_bytes(record)
    with pytest.raises(InputError, match=r"sampling\.json"):
        open_samples(tmp_path)


def test_samples_may_be_of_any_shape(tmp_path: Path, pixels: np.ndarray) -> None:
    np.savez(tmp_path / "oblong.npz", arr_0=pixels[:, :4])
    write_pngs(tmp_path / "oblong", pixels[:, :4], [""] * 6)
    for samples in (open_samples(tmp_path / "oblong.npz"), open_samples(tmp_path / "oblong")):
        assert samples.shape == (4, 8)
        assert np.array_equal(samples.pixels(5), pixels[5, :4])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((1, 12_000, 12_000, 3), np.uint8),
            "images of 12000 x 12000 pixels are too large; use at most 120000000 pixels",
        ),
        (np.zeros((10**9, 0, 4, 3), np.uint8), "arr_0 must be uint8 N x H x W x 3, got uint8 1000000000 x 0 x 4 x 3"),
        (np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)), "must be in C order: save numpy.ascontiguousarray"),
    ],
)
def test_an_npz_of_impossible_images_is_refused_before_it_is_read(
    tmp_path: Path, images: np.ndarray, message: str
) -> None:
    np.savez_compressed(tmp_path / "a.npz", images)
    with pytest.raises(InputError, match=message):
        open_samples(tmp_path / "a.npz")
