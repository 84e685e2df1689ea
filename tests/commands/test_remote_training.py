"""`fit` on shards served over HTTP equals `fit` on the folder, even if the server dies in between."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import prepare_run
from processes import start
from shard_server import ShardServer, serving

from lightning_mvar import Tokenizer
from lightning_mvar.cli import run
from lightning_mvar.io import fetch as fetching

FIT = ["fit", "--config", "run.yaml", "--data.block_size", "1"]  # reads one shard at a time


def shorten_waits(rank: int) -> None:
    fetching.FIRST_WAIT_S = 0.01


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture
def server(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ShardServer]:
    """Prepares a folder for `fit` and serves its shards."""
    prepare_run(tmp_path, tokenizer, tokenizer_folder, draws=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "shards") as running:
        yield running


def remote_fit(server: ShardServer) -> list[str]:
    return [*FIT, "--data.train", server.url, "--data.cache_dir", "cache", "--data.retries", "2"]


def test_a_run_whose_server_dies_reports_it_and_resumes_exactly(server: ShardServer, tmp_path: Path) -> None:
    local = start([*FIT, "--trainer.default_root_dir", "local"], tmp_path)
    assert local.wait() == [0], local.printed()
    server.alive_for = 3  # the manifest and two of the three shards
    stopped = start(remote_fit(server), tmp_path, prepare=shorten_waits)
    assert stopped.wait() == [1], stopped.printed()
    errors = [line for line in stopped.printed().splitlines() if line.startswith("lightning-mvar: error:")]
    assert len(errors) == 1, stopped.printed()
    assert f"error: {server.url}/00000" in errors[0]
    assert "cannot be read (Server disconnected), in 3 attempt(s): check the address and the network" in errors[0]
    assert "Traceback" not in stopped.printed()
    server.alive_for = None
    server.requests.clear()
    resumed = start([*remote_fit(server), "--resume"], tmp_path, prepare=shorten_waits)
    assert resumed.wait() == [0], resumed.printed()
    assert Counter(name[-5:] for name in server.requests) == {".json": 1, "1.tar": 1}  # only the missing shard
    actual, expected = weights(tmp_path / "run"), weights(tmp_path / "local")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_data_workers_failure_is_reported_in_one_line(
    server: ShardServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.01)
    server.alive_for = 3
    assert run([*remote_fit(server), "--data.num_workers", "2"]) == 1
    error = capfd.readouterr().err
    assert f"lightning-mvar: error: {server.url}/00000" in error
    assert "DataLoader worker" not in error


def test_mistakes_are_reported_in_one_line(server: ShardServer, capfd: pytest.CaptureFixture[str]) -> None:
    for options, message in [
        (["--data.train", "nfs://host/shards"], "nfs:// is not supported"),
        (["--data.train", "pipe:cat shards/{}", "--data.retries", "-1"], "data.retries must be at least 0, got -1"),
        (["--data.train", "pipe:cat nowhere/{}", "--data.retries", "0"], "manifest.json cannot be read (the command"),
        (["--data.val", "pipe:sed s/48/49/ shards/{}"], "do not fit the model: vocab_size is 49 in the shards"),
    ]:
        assert run([*FIT, *options]) == 1
        error = capfd.readouterr().err
        assert message in error
        assert error.count("lightning-mvar: error:") == 1
