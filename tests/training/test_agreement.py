"""Ranks that would train on different data end at the start, with one line that names the rank and its host."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
from conftest import write_token_shards
from processes import start

from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.errors import InputError
from lightning_mvar.training.agreement import Report, read_on_all_ranks, require_same


def move_rank_1(rank: int) -> None:
    """Lets rank 1 see the files of another machine."""
    if rank == 1:
        os.chdir("machine1")


@pytest.fixture
def machines(plain_run_folder: Path) -> Path:
    """A run folder, and that of another machine inside it, with the same files."""
    shutil.copytree(plain_run_folder, plain_run_folder / "machine1")
    return plain_run_folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_with_different_shards_end_before_the_first_batch(machines: Path, strategy: str) -> None:
    fingerprint = Manifest.load(machines / "shards").tokenizer
    write_token_shards(machines / "machine1/shards", fingerprint, [20, 12, 20])
    arguments = ["fit", "--config", "run.yaml", "--trainer.strategy", strategy, "--data.batch_size", "8"]
    ranks = start([*arguments, "--trainer.default_root_dir", str(machines / "run")], machines, 2, move_rank_1)
    assert ranks.wait() == [1, 1], ranks.printed()
    host, printed = socket.gethostname(), ranks.printed()
    assert f"error: rank 1 on {host} reads other data in data.train than rank 0 on {host}: give every rank" in printed
    assert "Traceback" not in printed
    assert not list((machines / "run").rglob("*.ckpt"))


def test_a_rank_without_shards_ends_the_others_with_its_message(machines: Path) -> None:
    (machines / "machine1/shards/000001.tar").unlink()
    arguments = ["fit", "--config", "run.yaml", "--trainer.strategy", "ddp", "--data.batch_size", "8"]
    ranks = start([*arguments, "--trainer.default_root_dir", str(machines / "run")], machines, 2, move_rank_1)
    assert ranks.wait() == [1, 1], ranks.printed()
    outputs = [path.read_text() for path in ranks.outputs]
    assert f"error: rank 1 on {socket.gethostname()}: shards/000001.tar is missing" in outputs[0]
    assert "Traceback" not in ranks.printed()


def test_a_damaged_shard_ends_all_ranks_before_the_first_batch(plain_run_folder: Path) -> None:
    """Each of two ranks verifies every second shard: the second one finds the damage in shard 1."""
    path = plain_run_folder / "shards/000001.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    arguments = ["fit", "--config", "run.yaml", "--trainer.strategy", "ddp", "--data.batch_size", "8"]
    ranks = start([*arguments, "--trainer.default_root_dir", str(plain_run_folder / "run")], plain_run_folder, 2)
    assert ranks.wait() == [1, 1], ranks.printed()
    outputs = [file.read_text() for file in ranks.outputs]
    message = "shards/000001.tar is damaged: its SHA-256 is not the manifest's; copy it again"
    assert f"error: rank 1 on {socket.gethostname()}: {message}" in outputs[0]
    assert "Traceback" not in ranks.printed()
    assert not list((plain_run_folder / "run").rglob("*.ckpt"))


def test_reports_are_compared_by_option() -> None:
    same = Report("a", {"data.train": "1", "data.val": "2"})
    require_same([same, same._replace(host="b")], same)
    with pytest.raises(
        InputError, match=r"^rank 2 on c reads other data in data.val than rank 0 on a: give every rank"
    ):
        require_same([same, same, Report("c", {"data.train": "1", "data.val": "3"})], same)
    failed = Report("c", {}, "no shards")
    with pytest.raises(InputError, match=r"^rank 1 on c: no shards$"):
        require_same([same, failed], same)
    with pytest.raises(InputError, match=r"^no shards$"):
        require_same([same, failed], failed)


def test_one_process_needs_no_agreement() -> None:
    assert read_on_all_ranks(lambda: (1, {"data.train": "1"})) == 1
