"""Loaders that a run can be resumed with at any batch, as Lightning's loops want them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import Any, Protocol


class BatchSource(Protocol):
    """What a loader reads: a length in batches of this rank, and the place to begin at."""

    epoch: int
    first_batch: int
    global_batch: int

    def __len__(self) -> int: ...


class ResumableLoader(ABC):
    """A loader as Lightning's loops want it: sized, and with a position in the epoch that is checkpointed.

    Every pass is a new epoch, except the first one after `load_state_dict`, which goes on at the saved position. The
    state says where the next batch comes from: {epoch, samples}, the same on every rank, and in samples, so that it
    means the same to a run with another global batch.

    Args:
        source: what to read.
        num_workers: processes that read ahead.
        pin_memory: whether batches are to be copied to a GPU.
    """

    def __init__(self, source: BatchSource, num_workers: int, pin_memory: bool) -> None:
        self.source, self.num_workers, self.pin_memory = source, num_workers, pin_memory
        self.epoch, self.position, self.resumed = -1, 0, False
        # How many batches have been trained on, where that is known: one that was handed out but interrupted is to
        # come again. Counted from `skipped` on.
        self.trained: Callable[[], int] = lambda: self.position
        self.skipped = 0
        self.limit = lambda: len(self)  # batches of an epoch that are used

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = False
        self.skipped = self.position - self.trained()
        self.source.epoch, self.source.first_batch = self.epoch, self.position
        for batch in self.batches():
            self.position += 1
            yield batch

    @abstractmethod
    def batches(self) -> Iterable[Any]:
        """This rank's batches of the source's epoch, from its first batch on."""

    def state_dict(self) -> dict[str, int]:
        position = min(self.position, self.skipped + self.trained())
        if self.epoch < 0 or position >= self.limit():
            return {"epoch": self.epoch + 1, "samples": 0}
        return {"epoch": self.epoch, "samples": position * self.source.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["samples"] // self.source.global_batch
        if self.position >= len(self):  # larger batches than when it was saved, and the rest does not fill one
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = True


def leave_signals_to_the_main_process(worker: int) -> None:
    """A cluster sends them to all processes of a job, and a worker that died would take the run with it."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=end_when_the_main_process_asks, daemon=True).start()


def end_when_the_main_process_asks() -> None:
    """Python ends the workers that are left at exit by SIGTERM, and waits for them: that one is to be heeded."""
    main = multiprocessing.parent_process()
    while main and signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)
