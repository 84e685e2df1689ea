"""Where to compute."""

from __future__ import annotations

import torch

from lightning_mvar.errors import InputError


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), or a torch device such as `cpu` or `cuda:1`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not available here ({str(error).splitlines()[0]})") from error
    return device
