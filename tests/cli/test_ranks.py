"""Ranks that never start, and how long the others wait for them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import processes
import pytest
import torch.distributed as dist
from processes import start
from training_runs import act_in_step

from lightning_mvar.cli.ranks import stop_ranks_on_error
from lightning_mvar.cli.rendezvous import START_TIMEOUT, StartBarrier, start_timeout
from lightning_mvar.errors import InputError, Interrupted
from lightning_mvar.io.locks import lock_folder


def end_before_rendezvous(rank: int, killed: int) -> None:
    os.environ[START_TIMEOUT] = "1"
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
    message = f"rank {1 - killed} gives up: not all 2 ranks started within 1 s ("
    assert message in ranks.printed()
    assert "see the output of the other ranks" in ranks.printed()


def wait_in_steps(rank: int) -> None:
    act_in_step(rank, None, lambda module, batch: time.sleep(60))


def wait_briefly_for_locks(rank: int) -> None:
    import lightning_mvar.io.locks as module

    module.LOCK_TIMEOUT_S = 0.2


def test_a_rank_that_meets_another_run_ends(plain_run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = processes.free_port()
    monkeypatch.setattr(processes, "free_port", lambda: port)
    command = ["fit", "--config", "run.yaml", "--data.batch_size", "8", "--trainer.strategy", "ddp"]
    first = start(command, plain_run_folder, 2, prepare=wait_in_steps)
    while not list(plain_run_folder.rglob("config.yaml")):
        assert all(rank.is_alive() for rank in first.ranks), first.printed()
        time.sleep(0.1)
    second = start(command, plain_run_folder, 2, prepare=wait_briefly_for_locks, name="second")
    try:
        assert second.wait(60) == [1, 1], second.printed()
        assert [rank.exitcode for rank in first.ranks] == [None, None], first.printed()
    finally:
        first.send(signal.SIGKILL)
    refused, ended = (path.read_text() for path in second.outputs)
    assert "another fit is running in" in refused
    assert f"another run uses 127.0.0.1:{port}: give each run on this machine its own MASTER_PORT" in ended


def test_a_rank_that_is_refused_ends_the_others_with_its_message(plain_run_folder: Path) -> None:
    with lock_folder(plain_run_folder / "run", "tokenize"):
        command = ["fit", "--config", "run.yaml", "--data.batch_size", "8", "--trainer.strategy", "ddp"]
        ranks = start(command, plain_run_folder, 2, prepare=wait_briefly_for_locks)
        assert ranks.wait(60) == [1, 1], ranks.printed()  # the others would wait for 180 s
    for output in ranks.outputs:
        assert "another tokenize is running in run: wait for it" in output.read_text()
    assert f"rank 0 on {socket.gethostname()}: another" in ranks.outputs[1].read_text()


def start_rank(strategy: SimpleNamespace, failure: str, ended: Queue) -> None:
    """Runs one rank's part of a start: arrives, or aborts with `failure`."""
    barrier = StartBarrier(strategy, 20)
    try:
        barrier.abort(failure) if failure else barrier.arrive()
    except InputError as error:
        failure = str(error)
    ended.put((strategy.global_rank, failure, barrier))  # which stays open until all have read from it


@pytest.mark.parametrize("failing", [None, 0, 1, 2])
def test_all_ranks_start_or_all_hear_of_the_failure(failing: int | None) -> None:
    ended: Queue = Queue()
    environment = SimpleNamespace(main_address="127.0.0.1", main_port=processes.free_port())
    for rank in (2, 1, 0):  # rank 0, which opens the store, last
        strategy = SimpleNamespace(global_rank=rank, world_size=3, cluster_environment=environment)
        threading.Thread(target=start_rank, args=(strategy, "no data" if rank == failing else "", ended)).start()
        time.sleep(0.05)
    results = [ended.get(timeout=30) for _ in range(3)]
    assert {rank: failure for rank, failure, _ in results} == dict.fromkeys(
        range(3), "" if failing is None else "no data"
    )


def test_a_start_without_rank_0_ends() -> None:
    environment = SimpleNamespace(main_address="127.0.0.1", main_port=processes.free_port())
    strategy = SimpleNamespace(global_rank=1, world_size=2, cluster_environment=environment)
    with pytest.raises(dist.DistError, match=f"no answer from 127.0.0.1:{environment.main_port} within 0.3 s"):
        StartBarrier(strategy, 0.3)


def test_ranks_of_one_process_start_again_at_a_store_that_is_still_open() -> None:
    environment = SimpleNamespace(main_address="127.0.0.1", main_port=processes.free_port())
    strategy = SimpleNamespace(global_rank=0, world_size=1, cluster_environment=environment)
    barriers = [StartBarrier(strategy, 5) for _ in range(2)]
    for barrier in barriers:
        barrier.arrive()
    with pytest.raises(InputError, match="another run uses"):
        barriers[0].arrive()


def test_a_slow_link_to_rank_0_is_no_closed_port(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        def __init__(self, address: tuple[str, int], timeout: float) -> None:
            if timeout < 0.5:  # seconds for a round trip
                raise TimeoutError

        def close(self) -> None:
            pass

    environment = SimpleNamespace(main_address="127.0.0.1", main_port=processes.free_port())
    strategy = SimpleNamespace(global_rank=0, world_size=1, cluster_environment=environment)
    barrier = StartBarrier(strategy, 5)
    monkeypatch.setattr(socket, "create_connection", Connection)
    assert barrier.is_open()


@pytest.mark.parametrize("text", ["3m", "", "0", "-1", "nan", "inf"])
def test_a_start_timeout_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(START_TIMEOUT, text)
    with pytest.raises(InputError, match=f"{START_TIMEOUT}='{text}' is not a number of seconds"):
        start_timeout()


@pytest.mark.parametrize(("ranks", "handler"), [(1, signal.SIG_DFL), (2, signal.SIG_IGN)])
def test_an_interrupted_rank_ends_with_its_own_code_though_a_cluster_terminates_it(ranks: int, handler: int) -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    strategy = SimpleNamespace(global_rank=0, world_size=ranks, launcher=None)
    try:
        with pytest.raises(Interrupted), stop_ranks_on_error(strategy, "start again"):
            raise Interrupted(signal.SIGUSR1, "interrupted")
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, previous)
