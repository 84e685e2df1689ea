"""Remote shards equal those of the local folder despite network failures."""

import json
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import write_token_shards
from processes import CONTEXT
from shard_server import ShardServer, serving

from lightning_mvar.data.tokens.sources import LocalShards, RemoteShards, ShardSource, open_shards
from lightning_mvar.data.tokens.stream import TokenBatch, TokenLoader, TokenStream
from lightning_mvar.errors import InputError
from lightning_mvar.io import fetch as fetching

SIZES = [20, 20, 20, 7]
NAMES = [f"00000{i}.tar" for i in range(4)]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    write_token_shards(tmp_path / "shards", "abc", SIZES)
    with serving(tmp_path / "shards") as running:
        yield running


def remote_shards(server: ShardServer, cache: Path, retries: int = 5) -> RemoteShards:
    return RemoteShards(server.url, cache, retries)


def cached_files(cache: Path) -> list[str]:
    """Returns the names in the cache, without locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def read_batches(shards: ShardSource, workers: int = 0, epochs: int = 1) -> list[TokenBatch]:
    loader = TokenLoader(TokenStream(shards, shards.manifest(), 8, 0, 30, 0, 1), workers, pin_memory=False)
    return [batch for _ in range(epochs) for batch in loader]


def assert_equal(actual: list[TokenBatch], expected: list[TokenBatch]) -> None:
    assert len(actual) == len(expected) > 0
    for batch, expected_batch in zip(actual, expected, strict=True):
        assert batch.own is None
        assert all(torch.equal(a, b) for a, b in zip(batch[:4], expected_batch[:4], strict=True))


@pytest.mark.parametrize(
    "failures", [["404"], ["drop"], ["cut"], ["short"], ["wrong"], ["stall"], ["404", "cut", "drop", "wrong"]]
)
def test_failures_are_retried(
    server: ShardServer, tmp_path: Path, failures: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "stall" in failures:
        monkeypatch.setattr(fetching, "STALL_S", 1.0)
    server.failures[NAMES[1]] = list(failures)
    server.failures["manifest.json"] = [f for f in failures if f != "wrong"]
    shards = remote_shards(server, tmp_path / "cache")
    manifest = shards.manifest()
    assert manifest == LocalShards(server.folder).manifest()
    path = shards.fetch(manifest.shards[1])
    assert path.read_bytes() == (server.folder / NAMES[1]).read_bytes()
    assert cached_files(tmp_path / "cache") == [path.name]
    assert Counter(server.requests)[NAMES[1]] == len(failures) + 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("404", "there is no such file"),
        ("drop", "Server disconnected"),
        ("cut", "Response payload is not completed"),
        ("short", r"received \d+ bytes instead of \d+"),
        ("wrong", "the SHA-256 of the received bytes is"),
        ("stall", "no data for"),
    ],
)
def test_the_last_failed_attempt_raises_address_reason_and_remedy(
    server: ShardServer, tmp_path: Path, failure: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if failure == "stall":
        monkeypatch.setattr(fetching, "STALL_S", 0.5)
    shards = remote_shards(server, tmp_path / "cache", retries=2)
    shard = shards.manifest().shards[2]
    requests = 6 if failure == "drop" else 3  # aiohttp repeats a request once if the connection closes before an answer
    server.failures[NAMES[2]] = [failure] * requests  # type: ignore[list-item]
    with pytest.raises(
        InputError, match=rf"{server.url}/000002\.tar cannot be read \({reason}.*3 attempt.*data\.retries"
    ):
        shards.fetch(shard)
    assert Counter(server.requests)[NAMES[2]] == requests
    assert cached_files(tmp_path / "cache") == []
    assert shards.fetch(shard).is_file()


@pytest.mark.parametrize("response", ["<html>Sign in</html>", '{"format_version": 3'])
def test_a_response_that_is_no_manifest_is_retried(server: ShardServer, tmp_path: Path, response: str) -> None:
    (server.folder / "manifest.json").write_text(response)
    with pytest.raises(InputError, match=r"manifest\.json cannot be read \(the response is no.*3 attempt"):
        remote_shards(server, tmp_path / "cache", retries=2).manifest()
    assert Counter(server.requests)["manifest.json"] == 3


def test_a_manifest_of_another_release_is_not_retried(server: ShardServer, tmp_path: Path) -> None:
    (server.folder / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(InputError, match=r"has format_version 99; this release reads 3: another release wrote it"):
        remote_shards(server, tmp_path / "cache").manifest()
    assert Counter(server.requests)["manifest.json"] == 1


def test_waits_between_attempts_grow(server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(fetching, "sleep", waits.append)
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 1.0)
    server.dead = True
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        remote_shards(server, tmp_path, retries=8).manifest()
    assert len(waits) == 8
    for wait, nominal in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=True):
        assert 0.75 * nominal <= wait <= 1.25 * nominal


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_of_the_folder_and_are_cached(server: ShardServer, tmp_path: Path, workers: int) -> None:
    shards = remote_shards(server, tmp_path / "cache")
    expected = read_batches(LocalShards(server.folder), epochs=2)
    assert_equal(read_batches(shards, workers, epochs=2), expected)
    assert Counter(server.requests) == {"manifest.json": 1, **dict.fromkeys(NAMES, 1)}
    server.failures.update({name: ["404"] * 20 for name in NAMES})
    assert_equal(read_batches(remote_shards(server, tmp_path / "cache"), epochs=2), expected)


def test_a_command_can_be_a_source(tmp_path: Path) -> None:
    write_token_shards(tmp_path / "a b", "abc", SIZES)
    shards = open_shards(f"pipe:cat '{tmp_path}/a b/{{}}'", tmp_path / "cache", 0)
    assert_equal(read_batches(shards), read_batches(LocalShards(tmp_path / "a b")))
    shard = shards.manifest().shards[0]
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "a b" / NAMES[0]).unlink()
    with pytest.raises(InputError, match=r"000000\.tar' cannot be read \(the command exited with code 1\)"):
        shards.fetch(shard)


def test_an_epoch_can_resume_after_a_failure(server: ShardServer, tmp_path: Path) -> None:
    shards = remote_shards(server, tmp_path / "cache", retries=1)
    loader, local, resumed = (
        TokenLoader(TokenStream(source, shards.manifest(), 8, 0, 1, 0, 1), 0, pin_memory=False)  # one shard at a time
        for source in (shards, LocalShards(server.folder), shards)
    )
    expected = list(local)
    server.alive_for = len(server.requests) + 2
    head: list[TokenBatch] = []
    with pytest.raises(InputError, match=r"Server disconnected\), in 2 attempt"):
        head.extend(loader)
    assert 0 < len(head) < len(expected)
    server.alive_for = None
    resumed.load_state_dict(loader.state_dict())
    assert_equal(head + list(resumed), expected)


def test_after_a_change_only_the_changed_shards_are_downloaded(server: ShardServer, tmp_path: Path) -> None:
    first = read_batches(remote_shards(server, tmp_path / "cache"))
    shutil.rmtree(server.folder)
    write_token_shards(server.folder, "abc", [20, 20, 20, 9])
    server.requests.clear()
    second = read_batches(remote_shards(server, tmp_path / "cache"))
    assert server.requests.count("manifest.json") == 1
    assert set(server.requests) == {"manifest.json", NAMES[3]}
    assert_equal(second, read_batches(LocalShards(server.folder)))
    assert len(second) == len(first)


def test_a_truncated_file_in_the_cache_is_downloaded_again(server: ShardServer, tmp_path: Path) -> None:
    shards = remote_shards(server, tmp_path / "cache")
    shard = shards.manifest().shards[0]
    path = shards.fetch(shard)
    path.write_bytes(path.read_bytes()[:-1])
    assert shards.fetch(shard).read_bytes() == (server.folder / NAMES[0]).read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_in_the_cache_is_downloaded_again_once(
    server: ShardServer, tmp_path: Path, workers: int
) -> None:
    expected = read_batches(remote_shards(server, tmp_path / "cache"))
    path = remote_shards(server, tmp_path / "cache").fetch(LocalShards(server.folder).manifest().shards[1])
    content = path.read_bytes()
    path.write_bytes(content[:3000] + bytes([content[3000] ^ 4]) + content[3001:])
    server.requests.clear()
    assert_equal(read_batches(remote_shards(server, tmp_path / "cache"), workers), expected)
    assert Counter(server.requests) == {"manifest.json": 1, NAMES[1]: 1}
    assert path.read_bytes() == content


def test_feeds_without_end_are_cut_off_at_the_expected_size(server: ShardServer, tmp_path: Path) -> None:
    shards = remote_shards(server, tmp_path / "cache")
    shard = shards.manifest().shards[0]
    server.failures[NAMES[0]], server.failures["manifest.json"] = ["endless"], ["endless"]
    with pytest.raises(InputError, match=rf"{NAMES[0]} sends more than the {shard.bytes} bytes that are expected"):
        shards.fetch(shard)
    with pytest.raises(InputError, match=r"manifest\.json sends more than the 16777216 bytes that are expected"):
        shards.manifest()
    assert cached_files(tmp_path / "cache") == []
    command = open_shards("pipe:yes {}", tmp_path / "cache", 0)
    with pytest.raises(InputError, match=r"pipe:yes manifest\.json sends more than the 16777216 bytes"):
        command.manifest()


def test_a_feed_that_drips_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "STALL_S", 0.5)
    shards = open_shards("pipe:while true; do echo {}; sleep 0.1; done", tmp_path / "cache", 0)
    with pytest.raises(InputError, match=r"cannot be read \(only \d+ bytes in \d s\), in 1 attempt"):
        shards.manifest()


def test_a_shard_larger_than_the_disk_is_not_begun(server: ShardServer, tmp_path: Path) -> None:
    manifest = json.loads((server.folder / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = 2**60
    (server.folder / "manifest.json").write_text(json.dumps(manifest))
    shards = remote_shards(server, tmp_path / "cache")
    with pytest.raises(InputError, match=r"\.tar needs 1152921504606846976 bytes, but only \d+ are free .*: free"):
        shards.fetch(shards.manifest().shards[0])
    assert server.requests == ["manifest.json"]


def read_all(url: str, cache: Path, out: Path) -> None:
    shards = RemoteShards(url, cache, 0)
    torch.save([list(batch) for batch in read_batches(shards)], out)


def test_processes_with_one_cache_download_every_shard_once(server: ShardServer, tmp_path: Path) -> None:
    server.delay_s = 0.3  # longer than the time between their starts
    outs = [tmp_path / f"{i}.pt" for i in range(2)]
    processes = [CONTEXT.Process(target=read_all, args=(server.url, tmp_path / "cache", out)) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert Counter(server.requests) == {"manifest.json": 2, **dict.fromkeys(NAMES, 1)}
    expected = read_batches(LocalShards(server.folder))
    for out in outs:
        assert_equal([TokenBatch(*batch) for batch in torch.load(out)], expected)


def test_leftovers_of_a_killed_process_are_harmless(server: ShardServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    server.failures[NAMES[0]] = ["stall"]
    process = CONTEXT.Process(target=fetch_first, args=(server.url, cache))
    process.start()
    deadline = time.monotonic() + 30
    while not (cache.exists() and cached_files(cache)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(cached_files(cache)) == 1
    shards = remote_shards(server, cache)
    path = shards.fetch(shards.manifest().shards[0])
    assert cached_files(cache) == [path.name]
    assert path.read_bytes() == (server.folder / NAMES[0]).read_bytes()


def fetch_first(url: str, cache: Path) -> None:
    shards = RemoteShards(url, cache, 0)
    shards.fetch(shards.manifest().shards[0])


@pytest.mark.parametrize(
    ("location", "address"),
    [
        ("https://host/a/b", "https://host/a/b/0.tar"),
        ("https://host/a/b/", "https://host/a/b/0.tar"),
        ("https://host/a?signature=x%2F", "https://host/a/0.tar?signature=x%2F"),
        ("https://host/{}/content?x=1", "https://host/0.tar/content?x=1"),
        ("s3://bucket/a", "s3://bucket/a/0.tar"),
        ("hf://datasets/user/name@main/a", "hf://datasets/user/name@main/a/0.tar"),
        ("pipe:aws s3 cp s3://bucket/a/{} -", "pipe:aws s3 cp s3://bucket/a/0.tar -"),
    ],
)
def test_addresses(location: str, address: str) -> None:
    assert RemoteShards(location, Path("cache"), 0).address("0.tar") == address


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (
            "nfs://host/shards",
            r"nfs:// is not supported; use a path, https://, s3://, gs:// or hf://, or a command",
        ),
        ("pipe:cat shards", "does not name a file: put {} where"),
    ],
)
def test_unreadable_locations_are_rejected(location: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_shards(location, Path("cache"), 0)


def test_a_missing_library_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"s3://a/b needs a library .*s3fs.*: pip install "):
        open_shards("s3://a/b", tmp_path, 5)


def test_an_unwritable_cache_is_reported(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    shards = remote_shards(server, tmp_path / "cache")
    with pytest.raises(InputError, match=r"cannot lock .*: set data\.cache_dir"):
        shards.fetch(shards.manifest().shards[0])


@pytest.mark.parametrize(
    ("name", "value"), [("name", "x; touch harm"), ("name", "../0.tar"), ("sha256", "../../etc/a")]
)
def test_names_that_contain_commands_or_paths_are_rejected(
    server: ShardServer, tmp_path: Path, name: str, value: str
) -> None:
    manifest = json.loads((server.folder / "manifest.json").read_text())
    manifest["shards"][1][name] = value
    (server.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json is damaged: it lists a shard"):
        remote_shards(server, tmp_path).manifest()


def test_an_unfinished_folder_is_rejected(server: ShardServer, tmp_path: Path) -> None:
    manifest = LocalShards(server.folder).manifest()
    manifest.shards.pop()
    manifest.save(server.folder)
    with pytest.raises(InputError, match=f"{server.url} is unfinished: 3 of 4 shards"):
        remote_shards(server, tmp_path).manifest()
