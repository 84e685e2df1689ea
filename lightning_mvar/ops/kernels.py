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

KERNELS: dict[str, Callable[..., Any]] = {}  # by purpose, see `look_for_kernels`


@cache
def look_for_kernels() -> None:
    """Fills `KERNELS` with the kernels available on this machine and logs them once."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return
    try:
        from lightning_mvar.ops.triton import adaln, mamba2, qk_norm

        KERNELS["mamba2"] = mamba2.mamba2_forward
        KERNELS["qk norm"] = qk_norm.qk_norm
        KERNELS["modulate"], KERNELS["add gated"] = adaln.modulate, adaln.add_gated
    except ImportError as error:
        log.info("Mamba-2, QK-norm and AdaLN: using torch operations, because Triton cannot be imported: %s", error)
    try:
        from torch.nn.attention.varlen import varlen_attn

        KERNELS["packed attention"] = varlen_attn
    except ImportError as error:
        log.info("attention inside scales: one call per scale, because torch has no variable-length kernel: %s", error)
    log.info("GPU kernels in use: %s", ", ".join(KERNELS) or "none")
