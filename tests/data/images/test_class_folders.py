"""Which folders are classes, which are splits, and what a folder without class folders is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from storage_forms import write_tar

from lightning_mvar.data.images.names import log_once
from lightning_mvar.data.images.sources import open_encoded
from lightning_mvar.errors import InputError


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    ("folder", "name"),
    [("flowers", "flowers"), ("flowers/train", "flowers"), ("flowers/Val/test", "flowers"), ("a/b/..", "a")],
)
def test_images_without_class_folders_are_of_one_class(folder: str, name: str, tmp_path: Path) -> None:
    root = write(tmp_path / folder, "2.png", "10.jpg", "notes.txt")
    images = open_encoded(str(root), None, None)
    assert images.class_names == [name]
    assert images.labels.tolist() == [0, 0]
    assert [images.key(i) for i in range(2)] == [f"{name}/10.jpg", f"{name}/2.png"]
    assert [images.read(i) for i in range(2)] == [b"10.jpg", b"2.png"]
    assert {*images.files()} == {root / "10.jpg", root / "2.png"}


def test_splits_without_class_folders_have_the_same_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "flowers" / split, "1.png")
    sources = [open_encoded(str(tmp_path / "flowers" / split), None, None) for split in ("train", "val")]
    assert sources[0].listing == sources[1].listing


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "set", "ant/1.png", "bee/2.png", "sheet.png")
    with pytest.raises(
        InputError, match=r"outside class folders, such as sheet.png, and inside, such as ant/1.png: move"
    ):
        open_encoded(str(root), None, None)


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "test", "validation"), ("train",), ("TESTING", "dev")])
@pytest.mark.parametrize("below", ["1.png", "ant/1.png"])
def test_splits_are_not_classes(names: tuple[str, ...], below: str, tmp_path: Path) -> None:
    paths = [f"{split}/{below}" for split in names]
    root = write(tmp_path / "set", *paths)
    look = "looks like a split rather than a class" if len(names) == 1 else "look like splits rather than classes"
    with pytest.raises(InputError, match=rf"which {look}: choose one, such as {root}/{names[0]}; if"):
        open_encoded(str(root), None, None)
    if len(names) > 1:
        with pytest.raises(InputError, match="splits rather than classes: pack each by itself; if they are classes"):
            open_encoded(write_tar(tmp_path / "a.tar", [(name, b"x") for name in paths]), None, None)


def folder_and_tar(root: Path, *names: str) -> list[str]:
    """Writes the same files as a folder and as a tar, and returns their paths."""
    return [str(write(root, *names)), write_tar(root.with_suffix(".tar"), [(name, name.encode()) for name in names])]


@pytest.mark.parametrize("packed", [False, True])
def test_class_names_confirm_folders_as_classes_in_their_order(packed: bool, tmp_path: Path) -> None:
    source = folder_and_tar(tmp_path / "set", "train/0.png", "test/0.png")[packed]
    images = open_encoded(source, None, ["train", "dev", "test"])
    assert images.class_names == ["train", "dev", "test"]
    assert [(images.key(i), int(images.labels[i])) for i in range(2)] == [("test/0.png", 2), ("train/0.png", 0)]
    with pytest.raises(InputError, match=f"{source}/test is not one of the classes of --class_names"):
        open_encoded(source, None, ["train", "dev"])


@pytest.mark.parametrize("packed", [False, True])
def test_class_names_name_the_class_of_images_without_class_folders(packed: bool, tmp_path: Path) -> None:
    source = folder_and_tar(tmp_path / "val_images", "0.png")[packed]
    assert open_encoded(source, None, ["flowers"]).class_names == ["flowers"]
    with pytest.raises(
        InputError, match=f"in {source} .* have one class, but --class_names has 2: pass their classes with"
    ):
        open_encoded(source, None, ["flowers", "trees"])


@pytest.mark.parametrize("inside", ["", "train/"])
def test_a_flat_tar_is_one_class_with_the_split_of_the_folder(tmp_path: Path, inside: str) -> None:
    names = [f"{i}.png" for i in range(30)]
    folder = open_encoded(str(write(tmp_path / "pics", *names)), None, None)
    packed = open_encoded(write_tar(tmp_path / "pics.tar", [(inside + name, b"x") for name in names]), None, None)
    assert packed.class_names == ["pics"]
    assert packed.listing == folder.listing
    assert packed.held_out.tolist() == folder.held_out.tolist()


def test_the_classes_and_their_numbers_of_images_are_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write(tmp_path / "set", *(f"ant/{i}.png" for i in range(1200)), *(f"b{i}/0.png" for i in range(10)))
    (root / "b0/0.png").unlink()
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "lightning_mvar"):
        for _ in range(2):
            open_encoded(str(root), None, None)
        open_encoded(str(write(tmp_path / "bad", "a\n\x1b[31m/0.png")), None, None)
    many, bad = [record.getMessage() for record in caplog.records]
    assert many == f"{root}: 11 classes, 1,209 images: ant (1,200), b0 (0), b1 (1), " + ", ".join(
        [*(f"b{i} (1)" for i in range(2, 9)), "..."]
    )
    assert bad.endswith(r"bad: 1 class, 1 image: 'a\n\x1b[31m' (1)")
