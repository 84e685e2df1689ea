"""Sums, means, maxima and broadcasts over all ranks without blocking the host: the GPU queues them after its own work.

Lightning's `reduce` waits at a barrier first and changes its argument in place.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mvar.devices import in_process_group


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, without gradient; the argument is not changed."""
    if not in_process_group():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the mean of a floating-point tensor over all ranks, without gradient; the argument is not changed."""
    return sum_over_ranks(tensor) / (dist.get_world_size() if in_process_group() else 1)


def broadcast_from_rank_zero(tensor: Tensor) -> Tensor:
    """Returns rank 0's tensor on every rank; all must pass one with the same shape, dtype and kind of device."""
    if not in_process_group():
        return tensor
    received = tensor.contiguous().clone()
    dist.broadcast(received, src=0)
    return received


class DelayedMax:
    """Maximum over all ranks of a number on the host, returned one call later; in a single process, the number itself.

    Each call starts a reduction in a gloo group, which does not involve the GPU, and returns the result of the previous
    one. So no rank waits for another that is less than one call behind. All ranks must call it equally often.

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
