"""Published files are downloaded once, checked, and kept where torch.hub keeps them."""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from shard_server import Failure, ShardServer, serving

from lightning_mvar.errors import InputError
from lightning_mvar.io import fetch, known_files
from lightning_mvar.io.known_files import KnownFile
from lightning_mvar.metrics.extractors.inception import InceptionV3
from lightning_mvar.metrics.reference import open_reference

CONTENT = bytes(range(256)) * 40
NAME = "weights-1234.pth"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.01)
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / NAME).write_bytes(CONTENT)
    with serving(tmp_path / "published") as server:
        yield server


def known(server: ShardServer) -> KnownFile:
    return KnownFile(f"{server.url}/{NAME}", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def files_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_two_processes_download_a_file_once_and_later_ones_read_it_offline(
    server: ShardServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand in for processes: each opens the lock for itself."""
    server.delay_s = 0.2
    with ThreadPoolExecutor(2) as pool:
        paths = [result.result() for result in [pool.submit(known(server).path) for _ in range(2)]]
    assert paths == [cache / NAME] * 2
    assert server.requests == [NAME]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert known(server).path().read_bytes() == CONTENT
    assert files_in(cache) == [NAME]


@pytest.mark.parametrize(
    ("failures", "reason"),
    [
        (["cut"], None),  # the next attempt succeeds
        (["short"] * 3, f"received {len(CONTENT) // 2} bytes instead of {len(CONTENT)}"),
        (["wrong"] * 3, "the SHA-256 of the received bytes is [0-9a-f]{64}, not [0-9a-f]{64}"),
        (["404"] * 3, "there is no such file"),
    ],
)
def test_a_file_arrives_whole_or_not_at_all(
    server: ShardServer, cache: Path, failures: list[Failure], reason: str | None
) -> None:
    server.failures[NAME] = list(failures)
    if reason is None:
        assert known(server).path().read_bytes() == CONTENT
        return
    remedy = re.escape(f"download {server.url}/{NAME} on another machine and save it as {cache / NAME}")
    with pytest.raises(InputError, match=rf"cannot be read \({reason}\), in 3 attempt\(s\): {remedy}$"):
        known(server).path()
    assert files_in(cache) == []


def test_an_interrupted_download_leaves_nothing(
    server: ShardServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    server.failures[NAME] = ["stall"]
    monkeypatch.setattr(fetch, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        known(server).path()
    assert NAME not in files_in(cache)


def test_offline_the_message_says_where_to_put_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(InputError, match=rf"^{name} is not on this machine, and HF_HUB_OFFLINE is set: download https"):
        InceptionV3()
    with pytest.raises(InputError, match=rf"save it as {cache}/VIRTUAL_imagenet512\.npz$"):
        open_reference("imagenet512")


def test_a_truncated_file_is_told(server: ShardServer, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT[:-1])
    with pytest.raises(InputError, match=rf"{NAME} has 10239 bytes instead of 10240: remove it"):
        known(server).path()


def test_hashes_agree_with_those_in_the_published_names() -> None:
    assert known_files.INCEPTION.url.endswith(f"-{known_files.INCEPTION.sha256[:8]}.pth")
    assert known_files.VGG16.url.endswith(f"-{known_files.VGG16.sha256[:8]}.pth")


def test_a_folder_named_like_a_published_reference_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet256").mkdir()
    assert open_reference("imagenet256").kind == "images"
    assert torch.hub.get_dir() == str(tmp_path / "torch/hub")
