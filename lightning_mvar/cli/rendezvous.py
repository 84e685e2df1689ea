"""Start-up of several ranks: a barrier before the process group exists, at which a failed rank stops the others."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Timer
from typing import Any

import torch.distributed as dist

from lightning_mvar.errors import InputError
from lightning_mvar.training.lightning_internals import has_process_group, setup_with_timeout
from lightning_mvar.training.lost_ranks import first_sentence, is_loss_of_rank

log = logging.getLogger(__name__)

START_TIMEOUT = "LIGHTNING_MVAR_START_TIMEOUT"  # environment variable: seconds for all ranks to start
DEFAULT_START_TIMEOUT_S, MAX_START_TIMEOUT_S, NOTICE_S = 180, 10**6, 15
ABORT_TIMEOUT_S = 15  # for the other ranks to read why one has failed
POLL_S, CONNECT_TIMEOUT_S = 0.1, 1.0
starts: Counter[tuple[str, int, int]] = Counter()  # barriers that this process has joined, by address and rank


class StartBarrier:
    """Barrier in a key-value store at MASTER_ADDR:MASTER_PORT, which ends if all ranks arrive or one reports a failure.

    The process group uses the same store later. Its own rendezvous waits twice its timeout for a store that nobody
    opens, and cannot tell why a rank is missing.

    Args:
        strategy: strategy of the trainer or the fabric.
        seconds: time for all ranks to arrive.

    Raises:
        InputError: if another run uses the address.
        DistError: if rank 0 does not open the store in time.
    """

    def __init__(self, strategy: Any, seconds: float) -> None:
        environment = strategy.cluster_environment
        self.rank, self.ranks = strategy.global_rank, strategy.world_size
        self.host, self.port = environment.main_address, environment.main_port
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # its agent opens the store
        self.opens = self.rank == 0 and not torchrun
        if not self.opens:
            self.wait_until(self.is_open)
        try:
            store = dist.TCPStore(
                self.host,
                self.port,
                is_master=self.opens,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=self.opens,
            )
        except dist.DistNetworkError as error:
            if self.opens:
                raise self.port_in_use() from error
            raise
        key = (self.host, self.port, self.rank)
        number, starts[key] = starts[key], starts[key] + 1  # a store may outlive its run
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.store = dist.PrefixStore(f"start/{restarts}/{number}", store)

    def is_open(self) -> bool:
        """Returns whether a process listens at the address."""
        try:
            socket.create_connection((self.host, self.port), timeout=CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if time.monotonic() > self.deadline:
                raise dist.DistStoreError(f"no answer from {self.host}:{self.port} within {self.seconds:g} s")
            time.sleep(POLL_S)

    def port_in_use(self) -> InputError:
        return InputError(
            f"another run uses {self.host}:{self.port}: give each run on this machine its own MASTER_PORT"
        )

    def arrive(self) -> None:
        """Waits for all ranks.

        Raises:
            InputError: if a rank has failed, or the barrier belongs to another run.
            DistError: if a rank does not arrive in time.
        """
        if self.store.add(f"arrived/{self.rank}", 1) > 1:
            raise self.port_in_use()
        arrived = self.store.add("arrived", 1)
        if self.rank == 0:
            self.wait_until(lambda: self.store.check(["failure"]) or self.store.add("arrived", 0) == self.ranks)
            if not self.store.check(["failure"]):
                self.store.set("failure", "")
        elif arrived <= self.ranks:
            self.wait_until(lambda: self.store.check(["failure"]))
        if failure := self.store.get("failure").decode():
            self.wait_for_readers()
            raise InputError(failure)

    def abort(self, failure: str) -> None:
        """Stops the other ranks with this rank's error message."""
        self.store.set("failure", failure)
        self.wait_for_readers()

    def wait_for_readers(self) -> None:
        """Waits until all ranks have read the failure if this rank hosts the store."""
        readers, deadline = self.store.add("readers", 1), time.monotonic() + ABORT_TIMEOUT_S
        while self.opens and readers < self.ranks and time.monotonic() < deadline:
            time.sleep(POLL_S)
            readers = self.store.add("readers", 0)


@contextmanager
def fail_together(strategy: Any) -> Iterator[None]:
    """Makes an InputError on one rank stop all ranks started by a cluster, which would otherwise wait for it."""
    try:
        yield
    except InputError as error:
        if has_process_group(strategy) and strategy.cluster_environment.creates_processes_externally:
            with suppress(InputError, dist.DistError):  # another run uses the address, or no rank listens any more
                rank = strategy.global_rank
                StartBarrier(strategy, ABORT_TIMEOUT_S).abort(f"rank {rank} on {socket.gethostname()}: {error}")
        raise


def limit_start(strategy: Any) -> None:
    """Limits how long ranks wait for each other at start-up to `START_TIMEOUT`, instead of a collective's timeout.

    If a rank is killed before the process group exists, there is no connection yet whose loss the others could notice.
    """
    if not has_process_group(strategy):  # a single device
        return
    seconds = start_timeout()
    setup_environment = strategy.setup_environment

    def setup_in_time() -> None:
        strategy.setup_environment = setup_environment
        rank, ranks = strategy.global_rank, strategy.world_size
        notice = Timer(NOTICE_S, lambda: log.info("rank %d is waiting for all %d ranks to start", rank, ranks))
        notice.start()
        try:
            barrier = StartBarrier(strategy, seconds)  # rank 0 keeps it open until the process group exists
            barrier.arrive()
            setup_with_timeout(strategy, timedelta(seconds=seconds))
        except RuntimeError as error:
            if not is_loss_of_rank(error):
                raise
            raise InputError(
                f"rank {rank} gives up: not all {ranks} ranks started within {seconds:g} s ({first_sentence(error)}): "
                f"see the output of the other ranks, or set {START_TIMEOUT}=SECONDS to wait longer"
            ) from error
        finally:
            notice.cancel()

    strategy.setup_environment = setup_in_time


def start_timeout() -> float:
    """Returns the seconds to wait for all ranks to start; raises InputError if the environment variable is invalid."""
    text = os.environ.get(START_TIMEOUT, str(DEFAULT_START_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_START_TIMEOUT_S:
        raise InputError(f"{START_TIMEOUT}={text!r} is not a number of seconds")
    return seconds
