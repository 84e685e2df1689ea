"""What systems and programs leave among images is neither a class nor an image, and is reported once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from storage_forms import write_tar

from lightning_mvar.data.images.names import log_once
from lightning_mvar.data.images.sources import open_encoded, open_images
from lightning_mvar.errors import InputError

IMAGES = ["ant/0.png", "ant/1.jpg", "bee/0.png", "bee/deep/2.JPEG"]
CLUTTER = [
    *("__MACOSX/ant/._0.png", "ant/._0.png", "._ant", ".DS_Store", "ant/Thumbs.db", "ant/@eaDir/0.png/SYNO_THUMB.jpg"),
    *(".ipynb_checkpoints/0-checkpoint.png", "ant/.ipynb_checkpoints/0-checkpoint.png", ".hidden/0.png"),
    *("ant/PaxHeaders.123/0.png", "$RECYCLE.BIN/0.png", "System Volume Information/0.png", "lost+found/0.png"),
]


@pytest.fixture(autouse=True)
def forget_what_was_told() -> None:
    log_once.cache_clear()


def write(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(source: Path) -> list[str]:
    images = open_encoded(str(source), None, None)
    assert images.class_names == ["ant", "bee"]
    return [images.key(i) for i in range(len(images))]


def test_one_rule_for_folders_and_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "folder", [*IMAGES, *CLUTTER, "readme.txt"])
    tar = write_tar(tmp_path / "a.tar", [(name, b"x") for name in [*IMAGES, *CLUTTER, "readme.txt"]])
    inner = [
        (f"{c}.tar", Path(write_tar(tmp_path / f"{c}.tar", [(n, b"x") for n in names])).read_bytes())
        for c, names in {"ant": ["0.png", "1.jpg", "._0.png"], "bee": ["0.png", "2.JPEG", ".DS_Store"]}.items()
    ]
    tars = write_tar(tmp_path / "train/a.tar", inner)
    for _ in range(2):  # the second opening says nothing more
        assert listed(folder) == IMAGES
        assert listed(Path(tar)) == IMAGES
        assert listed(Path(tars)) == ["ant/0.png", "ant/1.jpg", "bee/0.png", "bee/2.JPEG"]
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 3
    assert "hidden or system files or folders (13, such as" in lines[0]
    assert "files of other types (1, such as 'readme.txt')" in lines[0]
    assert f"hidden or system files or folders ({len(CLUTTER)}, such as" in lines[1]
    assert "hidden or system files or folders (2, such as" in lines[2]


def test_links_to_folders_are_followed_once_and_never_in_a_loop(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", IMAGES)
    outside = write(tmp_path / "outside", ["9.png", "more/8.png"])
    os.symlink("..", folder / "ant/loop")
    os.symlink(folder, outside / "back")
    os.symlink(tmp_path, folder / "bee/above")
    os.symlink("ant", folder / "ant_again")
    os.symlink(outside, folder / "bee/linked")
    os.symlink(outside / "more", folder / "bee/more_again")
    os.symlink("0.png", folder / "ant/7.png")
    added = ["ant/7.png", "bee/linked/9.png", "bee/more_again/8.png"]
    assert listed(folder) == sorted([*IMAGES, *added])


def test_a_linked_class_counts(tmp_path: Path) -> None:
    folder, outside = write(tmp_path / "set", IMAGES[:2]), write(tmp_path / "elsewhere", ["0.png"])
    os.symlink(outside, folder / "bee")
    assert listed(folder) == ["ant/0.png", "ant/1.jpg", "bee/0.png"]


def test_a_broken_link_and_a_pipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "set", IMAGES)
    os.symlink("nowhere.png", folder / "ant/9.png")
    os.mkfifo(folder / "ant/8.png")
    (folder / "ant/folder.png").mkdir()
    images = open_images(str(folder), 8, "skip")
    assert images.identity
    assert images.key(2) == "ant/9.png"
    assert "9.png cannot be decoded (it is a link to a file that does not exist)" in str(images[2].error)
    assert "pipes or devices (1, such as 'ant/8.png')" in caplog.text


def test_a_link_to_itself_is_a_broken_link(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", IMAGES)
    os.symlink("loop.png", folder / "ant/loop.png")
    images = open_images(str(folder), 8, "skip")
    assert images.identity
    (error,) = [str(images[i].error) for i in range(len(images)) if images.key(i) == "ant/loop.png"]
    assert "it is a link to a file that does not exist" in error


def test_the_only_folder_is_not_taken_for_the_only_class(tmp_path: Path) -> None:
    write(tmp_path / "repository", [f"data/{name}" for name in IMAGES])
    with pytest.raises(InputError, match=r"has one folder, data, with 2 folders in it: .* pass --images .*/data; if"):
        open_encoded(str(tmp_path / "repository"), None, None)
    one = write(tmp_path / "one", ["ant/0.png", "ant/more/1.png"])
    assert open_encoded(str(one), None, None).class_names == ["ant"]


@pytest.mark.parametrize("suffix", ["tar", "parquet", "arrow"])
def test_archives_of_several_splits_are_not_mixed(suffix: str, tmp_path: Path) -> None:
    files = [f"data/train-00000-of-00002.{suffix}", f"data/train-00001-of-00002.{suffix}", f"data/test-00000.{suffix}"]
    write(tmp_path / "hub", [*files, "README.md"])
    message = r"splits test \(1 files\), train \(2 files\): choose one, such as --images '.*/data/\*test\*'"
    with pytest.raises(InputError, match=message):
        open_encoded(str(tmp_path / "hub"), None, None)
    write(tmp_path / "saved", [f"train/data-0.{suffix}", f"test/data-0.{suffix}", "dataset_dict.json"])
    with pytest.raises(InputError, match=r"has the splits test, train: choose one, such as --images .*/saved/test"):
        open_encoded(str(tmp_path / "saved"), None, None)
