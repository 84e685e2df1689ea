"""Data loaders that can resume at any batch, as Lightning's loops expect of stateful loaders."""

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
    """A source of one rank's batches: its length in batches and the position to start from."""

    epoch: int
    first_batch: int
    global_batch: int

    def __len__(self) -> int: ...


class ResumableLoader(ABC):
    """A sized loader whose position in the epoch is checkpointed.

    Every pass is a new epoch, except the first one after `load_state_dict`, which resumes at the saved position. The
    state {epoch, samples} is the position of the next batch. It is the same on all ranks and counts samples, so that a
    run with another global batch size can resume from it.

    Args:
        source: source of the batches.
        num_workers: number of processes that read ahead.
        pin_memory: whether to pin batches for the copy to a GPU.
    """

    def __init__(self, source: BatchSource, num_workers: int, pin_memory: bool) -> None:
        self.source, self.num_workers, self.pin_memory = source, num_workers, pin_memory
        self.epoch, self.position, self.resumed = -1, 0, False
        # Number of batches trained on, counted from batch `start` of the epoch. A batch that was yielded but whose step
        # was interrupted does not count: it must be repeated after resuming.
        self.batches_trained: Callable[[], int] = lambda: self.position
        self.start = 0
        self.batches_per_epoch = lambda: len(self)  # the trainer may limit it
        self.repeats_epoch = False  # whether every epoch repeats the batches of the first, to overfit them

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = False
        self.start = self.position - self.batches_trained()
        self.source.epoch, self.source.first_batch = 0 if self.repeats_epoch else self.epoch, self.position
        for batch in self.batches():
            self.position += 1
            yield batch

    @abstractmethod
    def batches(self) -> Iterable[Any]:
        """Yields this rank's batches of `source.epoch`, starting at `source.first_batch`."""

    def state_dict(self) -> dict[str, int]:
        position = min(self.position, self.start + self.batches_trained())
        if self.epoch < 0 or position >= self.batches_per_epoch():
            return {"epoch": self.epoch + 1, "samples": 0}
        return {"epoch": self.epoch, "samples": position * self.source.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["samples"] // self.source.global_batch
        if self.position >= len(self):  # batches are larger now, and the rest of the epoch does not fill one
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = True


def worker_options(num_workers: int) -> dict[str, Any]:
    """Returns the options of a DataLoader's workers. On Linux they are forked, no longer the default in Python 3.14.

    A forked worker starts at once and shares memory with its parent; others import torch and copy all images.
    """
    context = "fork" if num_workers and sys.platform == "linux" else None
    return {
        "num_workers": num_workers,
        "multiprocessing_context": context,
        "worker_init_fn": ignore_signals_in_worker,
    }


def ignore_signals_in_worker(worker_id: int) -> None:
    """Leaves signals to the main process: clusters signal all processes of a job, and a dead worker ends the run."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=exit_on_sigterm_from_main, daemon=True).start()


def exit_on_sigterm_from_main() -> None:
    """Exits on SIGTERM from the main process, which terminates the remaining workers at exit and waits for them."""
    main = multiprocessing.parent_process()
    while main and signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)
