"""Errors that say that another rank cannot be reached."""

from __future__ import annotations

import torch.distributed as dist

MESSAGES = ("/gloo/", "NCCL communicator was aborted")  # in errors that are not a DistError


def is_loss_of_rank(error: BaseException) -> bool:
    """Returns whether an error of torch.distributed says that another rank cannot be reached."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in MESSAGES)


def first_sentence(error: BaseException) -> str:
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0].rstrip(".")
