"""Folders, tars, WebDataset shards and Parquet files of the same images are equivalent."""

from __future__ import annotations

import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_folder import (
    CLASSES,
    add_file,
    make_image_files,
    write_folder,
    write_parquet,
    write_tar_of_folders,
    write_tar_of_tars,
    write_webdataset,
)

from lightning_mvar.data.images.class_words import read_class_names
from lightning_mvar.data.images.crops import DecodedImages
from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.data.images.labels import read_development_kit
from lightning_mvar.data.images.sources import open_encoded, open_images
from lightning_mvar.errors import InputError

Sources = dict[str, tuple[str, list[str] | None]]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return make_image_files(per_class=1)


@pytest.fixture(scope="module")
def formats(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Source string and class names (if the source has numbers) of each storage format."""
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
def source(request: pytest.FixtureRequest, formats: Sources) -> EncodedImages:
    name, class_names = formats[request.param]
    return open_encoded(name, None, class_names)


def test_all_formats_give_the_same_files_in_the_same_order(source: EncodedImages, files: dict[str, bytes]) -> None:
    keys = sorted(files, key=lambda key: key.split("/"))
    assert [source.key(i) for i in range(len(source))] == keys
    assert source.class_names == CLASSES
    assert source.labels.tolist() == [CLASSES.index(key.split("/")[0]) for key in keys]
    assert all(source.read(i) == files[key] for i, key in enumerate(keys))
    assert all(key.split("/")[1] in source.display_path(i) for i, key in enumerate(keys))


def test_the_listing_depends_on_names_and_labels(
    source: EncodedImages, files: dict[str, bytes], tmp_path: Path
) -> None:
    assert source.listing == open_encoded(str(write_folder(files, tmp_path / "same")), None, None).listing
    fewer = dict(list(files.items())[1:])
    assert source.listing != open_encoded(str(write_folder(fewer, tmp_path / "other")), None, None).listing


def test_imagenet_is_a_name_of_its_classes() -> None:
    assert read_class_names("imagenet") == CLASSES


def is_held_out(name: str) -> bool:
    return int(sha256(name.encode()).hexdigest()[:16], 16) % 10 == 0


@pytest.mark.parametrize("name", ["folder", "parquet"])
def test_a_tenth_of_the_keys_is_held_out(formats: Sources, files: dict[str, bytes], name: str) -> None:
    held_out = [key for key in files if is_held_out(key)]
    assert 60 <= len(held_out) <= 140  # of 1,000
    expected = {"val": set(held_out), "train": set(files) - set(held_out)}
    for split, keys in expected.items():
        images = open_encoded(f"{formats[name][0]}:{split}", None, None)
        assert {images.key(i) for i in range(len(images))} == keys
        assert images.class_names == CLASSES
        assert all(images.read(i) == files[images.key(i)] for i in range(0, len(images), 50))
        assert all(images.key(i).startswith(f"{CLASSES[label]}/") for i, label in enumerate(images.labels))


def test_a_folder_whose_name_ends_like_a_split_is_not_divided(tmp_path: Path, files: dict[str, bytes]) -> None:
    few = dict(list(files.items())[:30])
    folder = write_folder(few, tmp_path / "mine:val")
    assert len(open_encoded(str(folder), None, None)) == 30
    one = write_folder({next(iter(files)): b""}, tmp_path / "one")
    with pytest.raises(InputError, match="has no images"):
        [open_encoded(f"{one}:{split}", None, None) for split in ("train", "val")]


def test_row_groups_of_parquet_files_are_known(formats: Sources) -> None:
    source = open_encoded(formats["parquet"][0], None, None)
    assert source.groups is not None
    assert np.bincount(source.groups).max() == 100
    assert len(np.unique(source.groups)) == 3 * 4  # 3 files of 338 rows
    assert open_encoded(formats["folder"][0], None, None).groups is None


def test_thin_images_are_cropped_before_resizing(formats: Sources) -> None:
    images = open_images(formats["tar of tars"][0], 64)
    assert isinstance(images, DecodedImages)
    thin = next(i for i in range(len(images)) if images.encoded.key(i).endswith("_thin.png"))
    for example in (images[thin], images.random_crop(thin, torch.Generator().manual_seed(0))):
        assert example.image is not None
        assert example.image.shape == (3, 64, 64)


@pytest.fixture
def validation(files: dict[str, bytes], tmp_path: Path) -> tuple[Path, dict[str, int]]:
    """Images without classes, as in ILSVRC2012_img_val.tar."""
    keys = {f"ILSVRC2012_val_{i:08d}.JPEG": key for i, key in enumerate(list(files)[:30], start=1)}
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for name, key in reversed(keys.items()):
            add_file(archive, name, files[key])
    return tmp_path / "val.tar", {name: CLASSES.index(key.split("/")[0]) for name, key in keys.items()}


def write_development_kit(path: Path, labels: list[int], compressed: bool = False, **others: np.ndarray) -> None:
    """Writes class numbers of its own and a table of their meaning, as in ILSVRC2012_devkit_t12.tar.gz."""
    import io

    from scipy.io import savemat

    ids = np.random.default_rng(0).permutation(1000) + 1
    columns = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(ids[label], name, "words", 0) for label, name in enumerate(CLASSES)] + [(1001, "n00001740", "entity", 9)]
    table = io.BytesIO()
    savemat(table, {"synsets": np.array(rows, dtype=columns)[:, None]} | others, do_compression=compressed)
    with tarfile.open(path, "w:gz") as archive:
        add_file(archive, "ILSVRC2012_devkit_t12/data/meta.mat", table.getvalue())
        truth = "\n".join(str(ids[label]) for label in labels)
        add_file(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


@pytest.mark.parametrize("kind", ["names and ids", "names and numbers", "kaggle", "ids in order", "kit"])
def test_label_files_of_the_validation_images(
    validation: tuple[Path, dict[str, int]], kind: str, tmp_path: Path
) -> None:
    archive, expected = validation
    path, class_names = tmp_path / "labels.txt", CLASSES
    if kind == "kit":
        path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
        write_development_kit(path, list(expected.values()))
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
    actual = {source.key(i): int(source.labels[i]) for i in range(len(source))}
    assert actual == {f"{CLASSES[label]}/{name}": label for name, label in expected.items()}


def test_label_files_work_for_flat_folders(validation: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    archive, expected = validation
    with tarfile.open(archive) as tar:
        write_folder({name: tar.extractfile(name).read() for name in tar.getnames()}, tmp_path / "val")
    (tmp_path / "labels.txt").write_text("\n".join(f"{name} {CLASSES[label]}" for name, label in expected.items()))
    folder, packed = (open_encoded(str(s), str(tmp_path / "labels.txt"), None) for s in (tmp_path / "val", archive))
    assert folder.listing == packed.listing
    assert all(folder.read(i) == packed.read(i) for i in range(len(folder)))
    assert folder.display_path(0) == str(tmp_path / "val" / folder.key(0).split("/")[1])
    unlabeled = open_encoded(str(tmp_path / "val"), None, None)  # commands without labels hold out the same images
    names = [folder.key(i).split("/")[1] for i in range(len(folder))]
    assert folder.held_out.tolist() == packed.held_out.tolist() == [is_held_out(name) for name in names]
    assert sum(unlabeled.held_out) == sum(folder.held_out) > 0


def broken_sources(root: Path, files: dict[str, bytes]) -> dict[str, tuple[str, str | None, list[str] | None]]:
    """Sources that are refused, by a part of the error message."""
    few = dict(list(files.items())[:20])
    intact = write_tar_of_tars(few, root / "intact.tar").read_bytes()
    (root / "cut.tar").write_bytes(intact[: len(intact) // 2])
    (root / "text.tar").write_bytes(b"not an archive" * 100)
    with tarfile.open(root / "packed.tar", "w:gz") as archive:
        add_file(archive, "a/b.jpg", b"x")
    with tarfile.open(root / "flat.tar", "w") as archive:
        add_file(archive, "b.jpg", b"x")
    with tarfile.open(root / "none.tar", "w") as archive:
        add_file(archive, "b.txt", b"x")
    with tarfile.open(root / "unlabeled.tar", "w") as archive:
        add_file(archive, "a.jpg", b"x")
        add_file(archive, "a.cls", b"1")
        add_file(archive, "b.jpg", b"x")
    (root / "pics.zip").write_bytes(b"PK")
    (root / "half.parquet").write_bytes(b"PAR1" + b"x" * 100)
    (root / "labels.txt").write_text("b 0\nc 1\n")
    (root / "short.txt").write_text("0\n1\n")
    (root / "odd.txt").write_text("b n99999999\n")
    (root / "names.txt").write_text("only\n")
    return {
        "truncated in the middle|unexpected end": (str(root / "cut.tar"), None, None),
        "text.tar is not a tar": (str(root / "text.tar"), None, None),
        "packed.tar is not a tar": (str(root / "packed.tar"), None, None),
        "pics.zip is neither .* file: unpack it, and pass the folder": (str(root / "pics.zip"), None, None),
        "no images in": (str(root / "none.tar"), None, None),
        "unlabeled.tar: b.jpg has no class": (str(root / "unlabeled.tar"), None, None),
        "half.parquet is damaged": (str(root / "half.parquet"), None, None),
        "has 2 labels for the 1 images": (str(root / "flat.tar"), str(root / "short.txt"), None),
        "has no label for": (str(root / "intact.tar"), str(root / "labels.txt"), None),
        "class 'n99999999', which is not one of": (str(root / "flat.tar"), str(root / "odd.txt"), CLASSES),
        "nowhere.txt does not exist": (str(root / "flat.tar"), str(root / "nowhere.txt"), None),
        "nowhere.tar does not exist": (str(root / "nowhere.tar"), None, None),
        "short.txt is neither": (str(root / "short.txt"), None, None),
        "have the class 1; --class_names has 1": (str(root / "labeled.tar"), None, ["only"]),
    }


def test_broken_sources_are_refused_with_one_line(files: dict[str, bytes], tmp_path: Path) -> None:
    sources = broken_sources(tmp_path, files)
    with tarfile.open(tmp_path / "labeled.tar", "w") as archive:
        add_file(archive, "a.jpg", b"x")
        add_file(archive, "a.cls", b"1")
    for message, (source, labels, class_names) in sources.items():
        with pytest.raises(InputError, match=message) as error:
            open_encoded(source, labels, class_names)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("inner", [False, True])
def test_a_damaged_header_is_not_taken_for_the_end_of_an_archive(
    files: dict[str, bytes], inner: bool, tmp_path: Path
) -> None:
    few = dict(list(files.items())[:20])
    path = write_tar_of_tars(few, tmp_path / "a.tar") if inner else write_tar_of_folders(few, tmp_path / "a.tar")
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[7].offset
    data = bytearray(path.read_bytes())
    data[offset + 600 if inner else offset + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.tar is not a tar archive, is compressed or is damaged"):
        open_encoded(str(path), None, None)


def test_absolute_member_names_and_shards_without_classes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "mixed.tar", "w") as archive:
        add_file(archive, "/a/1.jpg", b"x")
        add_file(archive, "b/1.jpg", b"x")
    assert open_encoded(str(tmp_path / "mixed.tar"), None, None).class_names == ["a", "b"]
    for i in range(2):
        with tarfile.open(tmp_path / f"train-{i}.tar", "w") as archive:
            add_file(archive, f"{i}.jpg", b"x")
            add_file(archive, f"{i}.json", b"{}")
    with pytest.raises(InputError, match=r"train-0.tar has other files next to 0.jpg, but no .cls"):
        open_encoded(str(tmp_path / "train-{0..1}.tar"), None, None)


def test_parquet_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": b"x", "path": "a.jpg"}, None]
    fractions = pa.table({"image": pa.array(rows, image), "label": [0.5, 1.5]})
    parquet.write_table(fractions, tmp_path / "fractions.parquet")
    with pytest.raises(InputError, match="`label`, a number"):
        open_encoded(str(tmp_path / "fractions.parquet"), None, None)
    parquet.write_table(pa.table({"image": pa.array(rows, image), "label": [0, 1]}), tmp_path / "0.parquet")
    source = open_encoded(str(tmp_path / "0.parquet"), None, None)
    assert [source.read(i) for i in range(2)] == [b"x", b""]
    parquet.write_table(pa.table({"image": pa.array(rows, image)}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1.parquet has the columns image"):
        open_encoded(str(tmp_path / "{0..1}.parquet"), None, None)


def test_ambiguous_names_and_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder/a").mkdir(parents=True)
    (tmp_path / "folder/a" / b"caf\xe9.jpg".decode(errors="surrogateescape")).write_bytes(b"x")
    with pytest.raises(InputError, match="is not valid UTF-8: rename that image"):
        open_encoded(str(tmp_path / "folder"), None, None)
    (tmp_path / "folder/b.tar").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has folders as well as b.tar"):
        open_encoded(str(tmp_path / "folder"), None, None)
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        add_file(archive, "1.jpg", b"x")
    (tmp_path / "truth.txt").write_text("490\n")
    with pytest.raises(InputError, match="classes count from 0"):
        open_encoded(str(tmp_path / "val.tar"), str(tmp_path / "truth.txt"), None)


def test_a_read_failure_is_not_treated_as_a_corrupt_image(files: dict[str, bytes], tmp_path: Path) -> None:
    root = write_folder(dict(list(files.items())[:3]), tmp_path / "folder")
    images = open_images(str(root), 8, "skip")
    (root / images.key(1)).unlink()
    with pytest.raises(
        InputError, match=r"cannot be read .*No such file.*: make it readable, then run the command again"
    ):
        images[1]


def test_two_images_of_the_same_name_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for name in ("a/1.jpg", "b/1.jpg", "a/1.jpg"):
            add_file(archive, name, b"x")
    with pytest.raises(InputError, match=r"twice.tar: a/1.jpg and .* have the same name"):
        open_encoded(str(tmp_path / "twice.tar"), None, None)


def test_the_table_of_a_development_kit_may_be_compressed_but_not_grow(tmp_path: Path) -> None:
    write_development_kit(path := tmp_path / "kit.tar.gz", [0, 1], compressed=True)
    assert len(read_development_kit(path).lines) == 2
    write_development_kit(path, [0, 1], compressed=True, other=np.zeros(2**25, np.uint8))
    with pytest.raises(
        InputError, match=r"is damaged \(data/meta.mat has more than 16777216 bytes after decompression\)"
    ):
        read_development_kit(path)
