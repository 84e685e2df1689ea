"""Compute devices, precisions and ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from threading import Lock
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.errors import InputError

T = TypeVar("T")

# With `float32`, a GPU multiplies matrices in float32, as a CPU does; `tf32` rounds the factors to 10 bits of mantissa.
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EXACT_LOCK = Lock()
# Settings before each active `exact_float32`; the last block to end restores the first of them.
BEFORE_EXACT: list[tuple[str, bool]] = []


def set_tf32(allowed: bool) -> None:
    """Sets whether this process uses TF32 for matrix products and convolutions of float32 tensors on GPUs.

    Every command starts without TF32. PyTorch's own default lies in between: TF32 in convolutions only.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def exact_float32() -> Iterator[None]:
    """Disables TF32 whatever `set_tf32` allows: for tokens and scores.

    The setting is process-wide, so it also affects other threads until the last such block ends.
    """
    with EXACT_LOCK:
        BEFORE_EXACT.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        set_tf32(False)
    try:
        yield
    finally:
        with EXACT_LOCK:
            precision, convolutions = BEFORE_EXACT.pop()
            if not BEFORE_EXACT:
                torch.set_float32_matmul_precision(precision)
                torch.backends.cudnn.allow_tf32 = convolutions


def choose_device(name: str) -> torch.device:
    """Returns the device called `name`: `auto` (CUDA if available), or a torch device such as `cpu` or `cuda:1`.

    Raises:
        InputError: if the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not available on this machine ({str(error).splitlines()[0]})") from error
    return device


def without_autocast(x: Tensor) -> torch.autocast:
    """Returns a context in which operations on the device of `x` ignore an enclosing autocast."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # the meta device has no autocast


def in_process_group() -> bool:
    """Returns whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


def is_first_rank() -> bool:
    """Returns whether this process is rank 0, or the only one."""
    return rank_and_world_size()[0] == 0


def warn(message: str) -> None:
    """Prints a warning on rank 0."""
    if is_first_rank():
        tqdm.write(f"warning: {message}", file=sys.stderr)


def rank_and_world_size() -> tuple[int, int]:
    """Returns the rank of this process and the world size."""
    return (dist.get_rank(), dist.get_world_size()) if in_process_group() else (0, 1)


def object_from_rank_zero(value: T) -> T:
    """Returns rank 0's picklable value on every rank."""
    values = [value]
    if in_process_group():
        dist.broadcast_object_list(values)
    return values[0]


def objects_from_ranks(value: T) -> list[T]:
    """Returns the picklable values of all ranks, in order of rank, on every rank."""
    if not in_process_group():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_ranks() -> None:
    """Waits until every rank has called this."""
    if in_process_group():
        dist.barrier()


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's first parameter or buffer; the CPU if it has none."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
