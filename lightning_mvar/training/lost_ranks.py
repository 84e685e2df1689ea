"""What a rank does once another one cannot be reached."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

from lightning_mvar.devices import in_process_group

MESSAGES = ("/gloo/", "NCCL communicator was aborted")  # in errors that are not a DistError
SETTLE_S, POLL_S = 30.0, 0.1


def is_loss_of_rank(error: BaseException) -> bool:
    """Returns whether an error of torch.distributed says that another rank cannot be reached."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in MESSAGES)


def first_sentence(error: BaseException) -> str:
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0].rstrip(".")


def abort_stuck_collectives() -> None:
    """Ends collectives of NCCL that wait for a lost rank, if they do not complete within `SETTLE_S`.

    Everything that reads from the GPU, such as a checkpoint or the end of the trainer, would wait for them until NCCL's
    watchdog kills the process, after the timeout of the process group. What they leave in gradients and weights is
    arbitrary. So this also removes the process group: without it, a run of several ranks must not save its state.
    """
    if not in_process_group() or dist.get_backend() != dist.Backend.NCCL:
        return
    queued, deadline = torch.cuda.Event(), time.monotonic() + SETTLE_S
    queued.record()
    while not queued.query():
        if time.monotonic() > deadline:
            _abort_process_group()
            return
        time.sleep(POLL_S)
