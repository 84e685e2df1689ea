"""Sums, means and broadcasts over all ranks that no host waits for: the GPU queues them behind what it computes.

Lightning's `reduce` has all ranks meet at a barrier first, and changes its argument in place.
"""

from __future__ import annotations

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
