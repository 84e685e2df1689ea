"""Optional kernels, which need a certain GPU or package.

They are detected when a network is constructed and only read afterwards: torch.compile cannot trace an import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)

KERNELS: dict[str, Callable[..., Any]] = {}  # by purpose: `scan`, `packed attention`


@cache
def look_for_kernels() -> None:
    """Fills `KERNELS` with the kernels available on this machine and logs them once."""
    if not torch.cuda.is_available():
        return
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        KERNELS["scan"] = mamba_chunk_scan_combined
    except ImportError as error:
        log.info("scan: using torch operations, because mamba-ssm cannot be imported: %s", error)
    try:
        from torch.nn.attention.varlen import varlen_attn

        if torch.cuda.get_device_capability() >= (8, 0):
            KERNELS["packed attention"] = varlen_attn
    except ImportError as error:
        log.info("attention inside scales: one call per scale, because torch has no variable-length kernel: %s", error)
    log.info("GPU kernels in use: %s", ", ".join(KERNELS) or "none")
