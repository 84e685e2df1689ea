"""Kernels that only some GPUs, with some packages, have.

They are looked for when a network is made, and only read afterwards: torch.compile cannot trace an import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)

FOUND: dict[str, Callable[..., Any]] = {}  # by what they do: `scan`, `packed attention`


@cache
def look_for_kernels() -> None:
    """Fill `FOUND` with what this machine has, and say once in the log what that is."""
    if not torch.cuda.is_available():
        return
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        FOUND["scan"] = mamba_chunk_scan_combined
    except ImportError as error:
        log.info("scan: torch's operations (mamba-ssm is not usable here: %s)", error)
    try:
        from torch.nn.attention.varlen import varlen_attn

        if torch.cuda.get_device_capability() >= (8, 0):
            FOUND["packed attention"] = varlen_attn
    except ImportError as error:
        log.info("attention inside scales: a call for each (%s)", error)
    log.info("kernels of this GPU that are used: %s", ", ".join(FOUND) or "none")
