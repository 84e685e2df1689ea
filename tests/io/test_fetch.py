"""Archives of images from elsewhere are those that are here, whatever the way does."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, write_images
from shard_server import ShardServer, serving

from lightning_mvar.data.images.examples import ImageSource
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.errors import InputError
from lightning_mvar.io import fetch as fetching
from lightning_mvar.io.fetch import name_in

PATTERN = f"{{{','.join(CLASSES)}}}.tar"  # a tar of each class


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    write_images(tmp_path / "images")
    for name in CLASSES:
        with tarfile.open(tmp_path / "images" / f"{name}.tar", "w") as tar:
            for path in sorted((tmp_path / "images" / name).iterdir()):
                tar.add(path, path.name)
    with serving(tmp_path / "images") as running:
        yield running


def assert_same(ours: ImageSource, theirs: ImageSource) -> None:
    assert ours.listing == theirs.listing
    for index in range(len(theirs)):
        one, other = ours[index], theirs[index]
        assert (one.key, one.label) == (other.key, other.label)
        assert one.image is not None
        assert other.image is not None
        assert torch.equal(one.image, other.image)


def test_archives_are_fetched_once_and_failures_are_retried(server: ShardServer) -> None:
    here = open_images(f"images/{PATTERN}", 8)
    assert here.class_names == sorted(CLASSES)
    server.failures[f"{CLASSES[0]}.tar"] = ["404", "cut", "drop"]
    assert_same(open_images(f"{server.url}/{PATTERN}", 8), here)
    assert Counter(server.requests) == {f"{name}.tar": 4 if name == CLASSES[0] else 1 for name in CLASSES}
    server.dead = True
    assert_same(open_images(f"{server.url}/{PATTERN}", 8), here)
    left = [path for path in Path("outputs/image_cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert sorted(path.name for path in left) == sorted(f"{name}.tar" for name in CLASSES)


def test_a_command_fetches_too(server: ShardServer) -> None:
    assert_same(open_images(f"pipe:cat 'images/{PATTERN}'", 8, cache_dir="cache"), open_images(f"images/{PATTERN}", 8))
    assert len(list(Path("cache").rglob("*.tar"))) == len(CLASSES)


def test_an_archive_that_does_not_come_is_named(server: ShardServer) -> None:
    for source, message in (
        (f"{server.url}/nowhere.tar", r"nowhere\.tar cannot be read .* in 3 attempt\(s\)"),
        ("pipe:cat images/nowhere.tar", r"pipe:cat images/nowhere\.tar cannot be read .* in 3 attempt\(s\)"),
        ("nfs://host/a.tar", "webdataset does not read nfs://"),
        (f"{server.url}/archives", "does not say what the file is called"),
    ):
        with pytest.raises(InputError, match=message):
            open_images(source, 8, retries=2)
    half = Path(server.folder / f"{CLASSES[0]}.tar").read_bytes()[:700]
    (server.folder / "half.tar").write_bytes(half)
    with pytest.raises(InputError, match=r"image_cache/.*/half\.tar is no tar archive, or compressed, or damaged"):
        open_images(f"{server.url}/half.tar", 8)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://host.org/a/b-0001.tar?signature=x.y", "b-0001.tar"),
        ("https://host.org/tokens/", ""),
        ("https://host.org", ""),
        ("pipe:aws s3 cp s3://bucket.x/train/b.tar -", "b.tar"),
        ("pipe:cat 'a folder/b.parquet'", "b.parquet"),
        ("pipe:cat tokens/{}", ""),
    ],
)
def test_a_file_is_called_as_its_address_says(address: str, name: str) -> None:
    assert name_in(address) == name
