"""Compute devices, precisions and ranks."""

from __future__ import annotations

from itertools import chain
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from lightning_mvar.errors import InputError

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Returns the device of `name`: `auto` (CUDA if available), or a torch device such as `cpu` or `cuda:1`.

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


def in_process_group() -> bool:
    """Returns whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


def is_first_rank() -> bool:
    """Returns whether this process is rank 0, or the only one."""
    return not in_process_group() or dist.get_rank() == 0


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's first parameter or buffer; the CPU if it has none."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
