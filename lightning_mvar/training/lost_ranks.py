"""Handling of ranks that cannot be reached."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

from lightning_mvar.devices import in_process_group

MESSAGES = ("/gloo/", "NCCL communicator was aborted")  # in errors other than DistError


def is_loss_of_rank(error: BaseException) -> bool:
    """Returns whether an error of torch.distributed means that another rank cannot be reached."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in MESSAGES)


def first_sentence(error: BaseException) -> str:
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0].rstrip(".")


def abort_collectives() -> None:
    """Aborts the collectives of NCCL after the loss of a rank and removes the process group.

    They are queued on the GPU, and anything that reads from it, such as a checkpoint or the end of the trainer, would
    wait for the lost rank until NCCL's watchdog kills the process after the timeout of the process group. Aborted
    collectives leave arbitrary gradients and weights, so the run must not save its state afterwards.
    """
    if in_process_group() and dist.get_backend() == dist.Backend.NCCL:
        _abort_process_group()
