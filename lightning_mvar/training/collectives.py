"""Sums, means, maxima and broadcasts over all ranks that no host waits for: the GPU queues them behind its own work.

Lightning's `reduce` has all ranks meet at a barrier first, and changes its argument in place.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mvar.devices import in_process_group


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, without gradient; the tensor does not change."""
    if not in_process_group():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the mean of a floating-point tensor over all ranks, without gradient; the tensor does not change."""
    return sum_over_ranks(tensor) / (dist.get_world_size() if in_process_group() else 1)


def broadcast_from_rank_zero(tensor: Tensor) -> Tensor:
    """Returns rank 0's tensor on every rank; each passes one of the same shape, dtype and kind of device."""
    if not in_process_group():
        return tensor
    received = tensor.contiguous().clone()
    dist.broadcast(received, src=0)
    return received


class DelayedMax:
    """Maximum over all ranks of a number on the host, which is known one call later; in one process, the number itself.

    Each call starts a reduction, over a gloo group that no GPU waits for, and returns the result of the one before. So
    no rank waits for one that is less than a call behind. All ranks must call it equally often.

    Args:
        timeout: how long a rank waits for the others; gloo's default if None.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timeout) if in_process_group() else None
        self.pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, number: int) -> int:
        if self.group is None:
            return number
        previous, largest = self.pending, torch.tensor(number)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, self.group, async_op=True)
        assert work is not None
        self.pending = (work, largest)
        if previous is None:
            return 0
        previous[0].wait()
        return int(previous[1])
