"""Fetches shards in a background thread before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from lightning_mvar.data.tokens.manifest import Shard


class Prefetcher:
    """Fetches shards in the order of a list, one at a time, up to `ahead` shards beyond the requested one.

    The thread is a daemon, so a download that hangs does not keep an interrupted process alive.

    Args:
        fetch: returns a local file for a shard.
        shards: shards in the order in which they are needed.
        ahead: number of shards to fetch in advance.
    """

    def __init__(self, fetch: Callable[[Shard], Path], shards: Sequence[Shard], ahead: int) -> None:
        self.fetch, self.shards, self.ahead = fetch, shards, ahead
        self.requested: dict[int, Future[Path]] = {}
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.closed = False
        Thread(target=self.run, daemon=True).start()

    def path(self, position: int) -> Path:
        """Waits for the shard at a position and returns its local file; raises the error of its download."""
        for i in range(position, min(position + self.ahead + 1, len(self.shards))):
            if i not in self.requested:
                self.requested[i] = Future()
                self.queue.put(i)
        return self.requested[position].result()

    def run(self) -> None:
        while (position := self.queue.get()) is not None and not self.closed:
            future = self.requested[position]
            try:
                future.set_result(self.fetch(self.shards[position]))
            except BaseException as error:  # raised by `path`, in the thread that needs the file
                future.set_exception(error)

    def close(self) -> None:
        """Ends the thread once the current download has finished."""
        self.closed = True
        self.queue.put(None)
