"""Remote image archives give the same images as local ones, even if downloads fail at first."""

import gzip
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
from lightning_mvar.io import fetch
from lightning_mvar.io.fetch import Progress, remote_file_name

PATTERN = f"{{{','.join(CLASSES)}}}.tar"  # one tar per class


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    write_images(tmp_path / "images")
    for name in CLASSES:
        with tarfile.open(tmp_path / "images" / f"{name}.tar", "w") as tar:
            for path in sorted((tmp_path / "images" / name).iterdir()):
                tar.add(path, path.name)
    with serving(tmp_path / "images") as server:
        yield server


def assert_same_images(actual: ImageSource, expected: ImageSource) -> None:
    assert actual.listing == expected.listing
    for index in range(len(expected)):
        a, b = actual[index], expected[index]
        assert (a.key, a.label) == (b.key, b.label)
        assert a.image is not None
        assert b.image is not None
        assert torch.equal(a.image, b.image)


def test_archives_are_downloaded_once_and_failures_are_retried(server: ShardServer) -> None:
    local = open_images(f"images/{PATTERN}", 8)
    assert local.class_names == sorted(CLASSES)
    server.failures[f"{CLASSES[0]}.tar"] = ["404", "cut", "drop"]
    assert_same_images(open_images(f"{server.url}/{PATTERN}", 8), local)
    assert Counter(server.requests) == {f"{name}.tar": 4 if name == CLASSES[0] else 1 for name in CLASSES}
    server.dead = True
    assert_same_images(open_images(f"{server.url}/{PATTERN}", 8), local)
    cached = [path for path in Path("outputs/image_cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert sorted(path.name for path in cached) == sorted(f"{name}.tar" for name in CLASSES)


def test_archives_can_come_from_a_command(server: ShardServer) -> None:
    assert_same_images(
        open_images(f"pipe:cat 'images/{PATTERN}'", 8, cache_dir="cache"), open_images(f"images/{PATTERN}", 8)
    )
    assert len(list(Path("cache").rglob("*.tar"))) == len(CLASSES)


def test_unavailable_and_truncated_archives_are_reported(server: ShardServer) -> None:
    for source, message in (
        (f"{server.url}/nowhere.tar", r"nowhere\.tar cannot be read .* in 3 attempt\(s\)"),
        ("pipe:cat images/nowhere.tar", r"pipe:cat images/nowhere\.tar cannot be read .* in 3 attempt\(s\)"),
        ("nfs://host/a.tar", "nfs:// is not supported"),
        (f"{server.url}/archives", "archives has no file name"),
    ):
        with pytest.raises(InputError, match=message):
            open_images(source, 8, retries=2)
    half = Path(server.folder / f"{CLASSES[0]}.tar").read_bytes()[:700]
    (server.folder / "half.tar").write_bytes(half)
    with pytest.raises(InputError, match=r"image_cache/.*/half\.tar is not a tar archive, is compressed or is damaged"):
        open_images(f"{server.url}/half.tar", 8)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file:///etc/a.tar", "file:// is not supported"),
        ("simplecache::s3://bucket/a.tar", "simplecache:// is not supported"),
        ("s3://bucket/a::file:///b.tar", "is not a valid URL .*must not contain ::"),
        ("http://[::1/a.tar", r"http://\[::1/a\.tar is not a valid URL"),
        ("http://a::b/a.tar", "is not a valid URL"),
        ("http://host:port/a.tar", "is not a valid URL .Port could not be cast"),
        ("s3:///a.tar", "is not a valid URL .it needs a host or bucket"),
    ],
)
def test_other_schemes_and_malformed_urls_are_refused(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fetch.check_scheme(address)


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
def test_file_name_of_an_address(address: str, name: str) -> None:
    assert remote_file_name(address) == name


def test_an_archive_without_end_stops_before_the_disk_is_full(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "free_bytes", lambda path: 2**20)
    server.failures[f"{CLASSES[0]}.tar"] = ["endless"]
    with pytest.raises(InputError, match=r"dark\.tar sends more than the 1048576 bytes that are expected or fit on"):
        open_images(f"{server.url}/{CLASSES[0]}.tar", 8)
    assert server.requests == [f"{CLASSES[0]}.tar"]
    assert not list((tmp_path / "outputs/image_cache").rglob("*.tar"))


def test_a_file_with_a_content_encoding_arrives_as_it_is_stored(server: ShardServer, tmp_path: Path) -> None:
    data = gzip.compress(b"an archive")
    (server.folder / "a.tar.gz").write_bytes(data)
    fetch.download(f"{server.url}/a.tar.gz", tmp_path / "here", 1000)
    assert (tmp_path / "here").read_bytes() == data
    assert server.encodings == ["identity"]


def test_what_fsspec_cannot_parse_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(address: str, **options: object) -> None:
        raise AttributeError("no group")

    monkeypatch.setattr(fetch, "url_to_fs", fail)
    with pytest.raises(InputError, match=r"http://host/a is not a valid URL \(no group\)"):
        fetch.download("http://host/a", tmp_path / "here", 1000)


def test_a_download_that_states_too_large_a_size_ends_before_its_data() -> None:
    progress = Progress("https://host/a.tar", 10)
    progress.set_size(10)
    with pytest.raises(InputError, match="sends more than the 10 bytes that are expected"):
        progress.set_size(11)
