"""Ranks that never start, and how long the others wait for them."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import processes
import pytest
from processes import start
from training_runs import act_in_step

from lightning_mvar.cli.ranks import START_TIMEOUT, start_timeout
from lightning_mvar.errors import InputError


def end_before_rendezvous(rank: int, killed: int) -> None:
    os.environ[START_TIMEOUT] = "3"
    if rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("killed", "strategy"), [(1, "ddp"), (0, "ddp"), (1, "fsdp2")])
def test_a_rank_killed_before_the_process_group_exists_ends_the_other(
    plain_run_folder: Path, killed: int, strategy: str
) -> None:
    command = ["fit", "--config", "run.yaml", "--data.batch_size", "8", "--trainer.strategy", strategy]
    ranks = start(command, plain_run_folder, 2, prepare=partial(end_before_rendezvous, killed=killed))
    codes = ranks.wait(60)
    assert sorted(codes) == [-signal.SIGKILL, 1], ranks.printed()
    message = f"rank {1 - killed} gives up: not all 2 ranks started within 3 s ("
    assert message in ranks.printed()
    assert "see the output of the other ranks" in ranks.printed()


def wait_in_steps(rank: int) -> None:
    act_in_step(rank, None, lambda module, batch: time.sleep(60))


def start_in_three_seconds(rank: int) -> None:
    os.environ[START_TIMEOUT] = "3"


def test_a_rank_that_joins_another_run_gives_up(plain_run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = processes.free_port()
    monkeypatch.setattr(processes, "free_port", lambda: port)
    command = ["fit", "--config", "run.yaml", "--data.batch_size", "8", "--trainer.strategy", "ddp"]
    first = start(command, plain_run_folder, 2, prepare=wait_in_steps)
    while not list(plain_run_folder.rglob("config.yaml")):
        assert all(rank.is_alive() for rank in first.ranks), first.printed()
        time.sleep(0.1)
    second = start(command, plain_run_folder, 2, prepare=start_in_three_seconds, name="second")
    try:
        assert second.wait(60) == [1, 1], second.printed()
        assert [rank.exitcode for rank in first.ranks] == [None, None], first.printed()
    finally:
        first.send(signal.SIGKILL)
    refused, gave_up = (path.read_text() for path in second.outputs)
    assert "another fit is running in" in refused
    assert "rank 1 gives up: not all 2 ranks started within 3 s (" in gave_up


@pytest.mark.parametrize("text", ["3m", "", "0", "-1", "nan", "inf"])
def test_a_start_timeout_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(START_TIMEOUT, text)
    with pytest.raises(InputError, match=f"{START_TIMEOUT}='{text}' is not a number of seconds"):
        start_timeout()
