"""The same images, wherever they are stored: folders, tars, WebDataset shards, Parquet."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_folder import (
    CLASSES,
    add,
    pictures,
    write_folder,
    write_parquet,
    write_tar_of_folders,
    write_tar_of_tars,
    write_webdataset,
)

from lightning_mvar.data.images.crops import DecodedImages
from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.data.images.sources import open_encoded, open_images
from lightning_mvar.errors import InputError

Stored = dict[str, tuple[str, list[str] | None]]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return pictures(per_class=1)


@pytest.fixture(scope="module")
def stored(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Each way to store them: its name on the command line, and what its numbers mean."""
    root = tmp_path_factory.mktemp("imagenet")
    write_webdataset(files, root / "webdataset")
    return {
        "folder": (str(write_folder(files, root / "folder")), None),
        "tar of tars": (str(write_tar_of_tars(files, root / "train.tar")), None),
        "tar of folders": (str(write_tar_of_folders(files, root / "folders.tar")), None),
        "webdataset": (str(root / "webdataset"), CLASSES),
        "pattern": (str(root / "webdataset/train-{0000..0003}.tar"), CLASSES),
        "parquet": (str(write_parquet(files, root / "parquet")), None),
    }


@pytest.fixture(params=["folder", "tar of tars", "tar of folders", "webdataset", "pattern", "parquet"])
def source(request: pytest.FixtureRequest, stored: Stored) -> EncodedImages:
    name, class_names = stored[request.param]
    return open_encoded(name, None, class_names)


def test_every_way_to_store_them_gives_the_same_files_in_the_same_order(
    source: EncodedImages, files: dict[str, bytes]
) -> None:
    keys = sorted(files, key=lambda key: key.split("/"))
    assert [source.key(i) for i in range(len(source))] == keys
    assert source.class_names == CLASSES
    assert source.labels.tolist() == [CLASSES.index(key.split("/")[0]) for key in keys]
    assert all(source.read(i) == files[key] for i, key in enumerate(keys))
    assert all(key.split("/")[1] in source.where(i) for i, key in enumerate(keys))


def test_the_listing_tells_names_and_labels(source: EncodedImages, files: dict[str, bytes], tmp_path: Path) -> None:
    assert source.listing == open_encoded(str(write_folder(files, tmp_path / "same")), None, None).listing
    some = dict(list(files.items())[1:])
    assert source.listing != open_encoded(str(write_folder(some, tmp_path / "other")), None, None).listing


def test_row_groups_are_known_so_that_they_can_be_read_at_once(stored: Stored) -> None:
    source = open_encoded(stored["parquet"][0], None, None)
    assert source.groups is not None
    assert np.bincount(source.groups).max() == 100
    assert len(np.unique(source.groups)) == 3 * 4  # files of 338 rows
    assert open_encoded(stored["folder"][0], None, None).groups is None


def test_thin_pictures_are_cut_before_they_are_enlarged(stored: Stored) -> None:
    images = open_images(stored["tar of tars"][0], 64)
    assert isinstance(images, DecodedImages)
    thin = next(i for i in range(len(images)) if images.encoded.key(i).endswith("_thin.png"))
    for example in (images[thin], images.cropped(thin, torch.Generator().manual_seed(0))):
        assert example.image is not None
        assert example.image.shape == (3, 64, 64)


@pytest.fixture
def validation(files: dict[str, bytes], tmp_path: Path) -> tuple[Path, dict[str, int]]:
    """As ILSVRC2012_img_val.tar: images without classes."""
    chosen = {f"ILSVRC2012_val_{i:08d}.JPEG": key for i, key in enumerate(list(files)[:30], start=1)}
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for name, key in reversed(chosen.items()):
            add(archive, name, files[key])
    return tmp_path / "val.tar", {name: CLASSES.index(key.split("/")[0]) for name, key in chosen.items()}


def write_kit(path: Path, labels: list[int]) -> None:
    """As ILSVRC2012_devkit_t12.tar.gz: numbers of its own, and a table of what they mean."""
    import io

    from scipy.io import savemat

    ids = np.random.default_rng(0).permutation(1000) + 1
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(ids[label], name, "words", 0) for label, name in enumerate(CLASSES)] + [(1001, "n00001740", "entity", 9)]
    table = io.BytesIO()
    savemat(table, {"synsets": np.array(rows, dtype=kind)[:, None]})
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", table.getvalue())
        truth = "\n".join(str(ids[label]) for label in labels)
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


@pytest.mark.parametrize("kind", ["names and ids", "names and numbers", "kaggle", "ids in order", "kit"])
def test_labels_of_the_validation_images(validation: tuple[Path, dict[str, int]], kind: str, tmp_path: Path) -> None:
    archive, expected = validation
    path, class_names = tmp_path / "labels.txt", CLASSES
    if kind == "kit":
        path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
        write_kit(path, list(expected.values()))
    elif kind == "kaggle":
        rows = [f"{name.split('.')[0]},{CLASSES[label]} 1 2 3 4" for name, label in reversed(expected.items())]
        path.write_text("ImageId,PredictionString\n" + "\n".join(rows))
    elif kind == "ids in order":
        path.write_text("\n".join(CLASSES[label] for label in expected.values()))
    else:
        words = {name: CLASSES[label] if kind == "names and ids" else str(label) for name, label in expected.items()}
        path.write_text("\n".join(f"{name} {word}" for name, word in words.items()))
    source = open_encoded(str(archive), str(path), class_names if kind == "names and numbers" else None)
    assert source.class_names == CLASSES
    found = {source.key(i): int(source.labels[i]) for i in range(len(source))}
    assert found == {f"{CLASSES[label]}/{name}": label for name, label in expected.items()}


def test_a_folder_of_images_takes_labels_too(validation: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    archive, expected = validation
    with tarfile.open(archive) as tar:
        write_folder({name: tar.extractfile(name).read() for name in tar.getnames()}, tmp_path / "val")
    (tmp_path / "labels.txt").write_text("\n".join(f"{name} {CLASSES[label]}" for name, label in expected.items()))
    folder, packed = (open_encoded(str(s), str(tmp_path / "labels.txt"), None) for s in (tmp_path / "val", archive))
    assert folder.listing == packed.listing
    assert all(folder.read(i) == packed.read(i) for i in range(len(folder)))
    assert folder.where(0) == str(tmp_path / "val" / folder.key(0).split("/")[1])


def broken_sources(root: Path, files: dict[str, bytes]) -> dict[str, tuple[str, str | None, list[str] | None]]:
    """Sources that are refused, by a part of the message."""
    few = dict(list(files.items())[:20])
    whole = write_tar_of_tars(few, root / "whole.tar").read_bytes()
    (root / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (root / "text.tar").write_bytes(b"not an archive" * 100)
    with tarfile.open(root / "packed.tar", "w:gz") as archive:
        add(archive, "a/b.jpg", b"x")
    with tarfile.open(root / "flat.tar", "w") as archive:
        add(archive, "b.jpg", b"x")
    with tarfile.open(root / "none.tar", "w") as archive:
        add(archive, "b.txt", b"x")
    with tarfile.open(root / "unlabelled.tar", "w") as archive:
        add(archive, "a.jpg", b"x")
        add(archive, "a.cls", b"1")
        add(archive, "b.jpg", b"x")
    (root / "half.parquet").write_bytes(b"PAR1" + b"x" * 100)
    (root / "labels.txt").write_text("b 0\nc 1\n")
    (root / "short.txt").write_text("0\n1\n")
    (root / "odd.txt").write_text("b n99999999\n")
    (root / "names.txt").write_text("only\n")
    return {
        "ends in the middle|unexpected end": (str(root / "cut.tar"), None, None),
        "text.tar is no tar": (str(root / "text.tar"), None, None),
        "packed.tar is no tar": (str(root / "packed.tar"), None, None),
        "flat.tar does not tell of which classes": (str(root / "flat.tar"), None, None),
        "no images in": (str(root / "none.tar"), None, None),
        "unlabelled.tar: b.jpg has no class": (str(root / "unlabelled.tar"), None, None),
        "half.parquet is damaged": (str(root / "half.parquet"), None, None),
        "has 2 labels for the 1 images": (str(root / "flat.tar"), str(root / "short.txt"), None),
        "has no label for": (str(root / "whole.tar"), str(root / "labels.txt"), None),
        "class 'n99999999', which is none": (str(root / "flat.tar"), str(root / "odd.txt"), CLASSES),
        "nowhere.txt does not exist": (str(root / "flat.tar"), str(root / "nowhere.txt"), None),
        "nowhere.tar does not exist": (str(root / "nowhere.tar"), None, None),
        "short.txt is neither": (str(root / "short.txt"), None, None),
        "have the class 1; --class_names has 1": (str(root / "labelled.tar"), None, ["only"]),
    }


def test_sources_that_are_broken_are_refused_in_a_line(files: dict[str, bytes], tmp_path: Path) -> None:
    sources = broken_sources(tmp_path, files)
    with tarfile.open(tmp_path / "labelled.tar", "w") as archive:
        add(archive, "a.jpg", b"x")
        add(archive, "a.cls", b"1")
    for message, (source, labels, class_names) in sources.items():
        with pytest.raises(InputError, match=message) as caught:
            open_encoded(source, labels, class_names)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inner", [False, True])
def test_an_archive_with_a_damaged_header_is_not_taken_for_a_shorter_one(
    files: dict[str, bytes], inner: bool, tmp_path: Path
) -> None:
    few = dict(list(files.items())[:20])
    path = write_tar_of_tars(few, tmp_path / "a.tar") if inner else write_tar_of_folders(few, tmp_path / "a.tar")
    with tarfile.open(path) as archive:
        place = archive.getmembers()[7].offset
    data = bytearray(path.read_bytes())
    data[place + 600 if inner else place + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.tar is no tar archive, or compressed, or damaged"):
        open_encoded(str(path), None, None)


def test_absolute_names_and_shards_without_classes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "mixed.tar", "w") as archive:
        add(archive, "/a/1.jpg", b"x")
        add(archive, "b/1.jpg", b"x")
    assert open_encoded(str(tmp_path / "mixed.tar"), None, None).class_names == ["a", "b"]
    for i in range(2):
        with tarfile.open(tmp_path / f"train-{i}.tar", "w") as archive:
            add(archive, f"{i}.jpg", b"x")
            add(archive, f"{i}.json", b"{}")
    with pytest.raises(InputError, match=r"train-0.tar has other files beside 0.jpg, and no .cls"):
        open_encoded(str(tmp_path / "train-{0..1}.tar"), None, None)


def test_tables_that_are_not_of_images_and_numbers_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": b"x", "path": "a.jpg"}, None]
    words = pa.table({"image": pa.array(rows, image), "label": ["cat", "dog"]})
    parquet.write_table(words, tmp_path / "words.parquet")
    with pytest.raises(InputError, match="`label`, a number"):
        open_encoded(str(tmp_path / "words.parquet"), None, None)
    parquet.write_table(pa.table({"image": pa.array(rows, image), "label": [0, 1]}), tmp_path / "0.parquet")
    source = open_encoded(str(tmp_path / "0.parquet"), None, None)
    assert [source.read(i) for i in range(2)] == [b"x", b""]
    parquet.write_table(pa.table({"image": pa.array(rows, image)}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1.parquet has the columns image"):
        open_encoded(str(tmp_path / "{0..1}.parquet"), None, None)


def test_names_and_labels_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder/a").mkdir(parents=True)
    (tmp_path / "folder/a" / b"caf\xe9.jpg".decode(errors="surrogateescape")).write_bytes(b"x")
    with pytest.raises(InputError, match="is not in UTF-8: rename that image"):
        open_encoded(str(tmp_path / "folder"), None, None)
    (tmp_path / "folder/b.tar").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has folders and b.tar"):
        open_encoded(str(tmp_path / "folder"), None, None)
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        add(archive, "1.jpg", b"x")
    (tmp_path / "truth.txt").write_text("490\n")
    with pytest.raises(InputError, match="classes count from 0"):
        open_encoded(str(tmp_path / "val.tar"), str(tmp_path / "truth.txt"), None)


def test_a_disk_that_fails_is_not_taken_for_a_bad_image(files: dict[str, bytes], tmp_path: Path) -> None:
    root = write_folder(dict(list(files.items())[:3]), tmp_path / "folder")
    images = open_images(str(root), 8, "skip")
    (root / images.key(1)).unlink()
    with pytest.raises(InputError, match=r"cannot be read .*No such file.*: start again once it can"):
        images[1]


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for name in ("a/1.jpg", "b/1.jpg", "a/1.jpg"):
            add(archive, name, b"x")
    with pytest.raises(InputError, match=r"twice.tar: a/1.jpg and .* go by one name"):
        open_encoded(str(tmp_path / "twice.tar"), None, None)
