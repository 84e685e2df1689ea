"""Writes checkpoints in a thread while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lightning_mvar.devices import in_process_group
from lightning_mvar.training.collectives import DelayedMax

Write = Callable[[dict[str, Any], dist.ProcessGroup | None], BaseException | None]


class BackgroundWriter:
    """Copies a checkpoint to the host, then writes the copy in a thread; one at a time, and all ranks together.

    `torch.distributed.checkpoint.async_save` does the same, but only for sharded checkpoints, and without a hook for
    what must follow the write in the same thread (seal, rename). Lightning's `AsyncCheckpointIO` is for single files.

    The copy is pinned if the state is on a GPU. Its memory is reused for later checkpoints and is as large as a rank's
    shard of weights, weight average and optimizer moments.

    Args:
        device: device of the state.
        timeout: how long a rank waits for the others; gloo's default if None.
    """

    def __init__(self, device: torch.device, timeout: timedelta | None) -> None:
        on_gpu = device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=on_gpu,
            use_shared_memory=False,
            use_async_staging=False,  # the next step changes the weights in place
            use_non_blocking_copy=on_gpu,  # starts all copies, then waits for the last
        )
        self.stager = DefaultStager(options)
        self.executor = ThreadPoolExecutor(1, "checkpoint")
        # Training uses the default group at the same time, and its collectives would mix with those of the thread.
        self.group = dist.new_group(backend="gloo", timeout=timeout) if in_process_group() else None
        self.task: Future[BaseException | None] | None = None
        self.started, self.path = 0, Path()  # number of checkpoints, path of the last
        self.max_over_ranks = DelayedMax(timeout)

    def start(self, path: Path, checkpoint: dict[str, Any], write: Write) -> None:
        """Copies a checkpoint, then calls `write(copy, group)` in the thread; the previous write must have finished."""
        copy = self.stager.stage(checkpoint)
        self.path, self.started = path, self.started + 1
        self.task = self.executor.submit(write, copy, self.group)  # type: ignore[arg-type]

    def has_ended(self) -> bool:
        """Returns whether all ranks have finished writing, one call late; all ranks must call this equally often."""
        if self.task is None:
            return False
        ended = self.started - (not self.task.done())
        return -self.max_over_ranks(-ended) == self.started  # the smallest number over ranks

    def wait(self) -> BaseException | None:
        """Waits for this rank's write, if any; returns its result, or raises the exception that it did not catch."""
        task, self.task = self.task, None
        return None if task is None else task.result()

    def close(self) -> None:
        """Frees the thread and the copy."""
        self.executor.shutdown()
        self.stager.close()
