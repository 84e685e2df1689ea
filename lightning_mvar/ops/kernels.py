"""Optional kernels, which need a certain GPU, package or compiler.

They are detected when a network is moved to a GPU and only looked up afterwards: torch.compile cannot trace an import,
and code that runs on a CPU must not initialize CUDA.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)

Kernels = dict[str, Callable[..., Any]]  # by purpose

KERNELS: Kernels = {}  # available on this machine, see `look_for_kernels`


def triton_kernels(device: str = "cuda") -> Kernels:
    """Imports this package's Triton kernels and runs one, because Triton compiles with the system's C compiler.

    In Triton's interpreter (TRITON_INTERPRET=1) they also run on the CPU.
    """
    from lightning_mvar.ops.triton import adaln, mamba2, qk_norm

    x = torch.ones(1, 1, 16, device=device)
    adaln.modulate(x, x, x, 1e-6, x.dtype)
    return {
        "mamba2": mamba2.mamba2_forward,
        "qk norm": qk_norm.qk_norm,
        "modulate": adaln.modulate,
        "add gated": adaln.add_gated,
        "add and modulate": adaln.add_and_modulate,
    }


def packed_attention() -> Kernels:
    """Imports torch's variable-length attention and runs it once, because a build of torch may lack its kernel."""
    from torch.nn.attention.varlen import varlen_attn

    takes_scale = "scale" in inspect.signature(varlen_attn).parameters  # torch >= 2.11
    kernel = varlen_attn if takes_scale else with_scale(varlen_attn)
    x, offsets = torch.ones(1, 1, 8, dtype=torch.bfloat16, device="cuda"), torch.arange(2, device="cuda").int()
    kernel(x, x, x, offsets, offsets, 1, 1, scale=1.0)
    return {"packed attention": kernel}


def with_scale(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the keyword `scale`, the factor on the logits, to a kernel whose own factor is 1 / sqrt(p)."""

    def attend(q: torch.Tensor, *arguments: Any, scale: float) -> Any:
        return kernel(q * (scale * math.sqrt(q.shape[-1])), *arguments)

    return attend


SOURCES = [  # operation that is slower without the kernels, how to load them, remedy if they are missing
    ("Mamba-2, QK-norm and AdaLN", triton_kernels, "install a C compiler and the Triton that this torch requires"),
    ("attention inside scales", packed_attention, "install torch 2.10 or newer"),
]


@cache
def look_for_kernels() -> None:
    """Fills `KERNELS` with the kernels that run on this machine; warns once about those that do not, and why."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return
    for purpose, load, remedy in SOURCES:
        try:
            KERNELS.update(load())
        except Exception as error:  # broken packages and compilers raise anything; PyTorch operations still work
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("%s: using PyTorch operations, which are slower (%s); to mend it, %s", purpose, reason, remedy)
    log.info("GPU kernels in use: %s", ", ".join(KERNELS) or "none")
