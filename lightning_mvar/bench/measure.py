"""Measurement of the time, FLOPs and memory of any callable."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

Run = Callable[[], object]

PROC_SELF = Path("/proc/self")


def time_interleaved(runs: list[Run], repeats: int, device: torch.device) -> list[list[float]]:
    """Times `repeats` rounds that call each run once, after one warm-up round; returns the seconds of each run's calls.

    On a shared machine the speed drifts. Interleaving exposes all runs to the same drift, so their ratios stay valid.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    with tqdm(total=(repeats + 1) * len(runs), unit="run", desc="bench", leave=False) as bar:
        for round_index in range(repeats + 1):
            for run, times in zip(runs, seconds, strict=True):
                duration = elapsed(run, device)
                if round_index:
                    times.append(duration)
                bar.update()
    return seconds


def synchronized_time(device: torch.device) -> float:
    """Returns the clock in seconds after the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def large_matmul(dtype: torch.dtype, device: torch.device, seconds: float = 0.05) -> tuple[Run, int]:
    """Returns a product of two large square matrices, whose rate serves as a reference, and its FLOPs.

    The matrices grow until a product takes `seconds`, so that devices that only emulate `dtype` do not take too long.
    """
    side = 512
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = partial(torch.matmul, a, b)
        product()
        if elapsed(product, device) > seconds or side == 8192:
            return product, 2 * side**3
        side *= 2


def elapsed(run: Run, device: torch.device) -> float:
    begin = synchronized_time(device)
    run()
    return synchronized_time(device) - begin


def peak_memory(run: Run, device: torch.device) -> int:
    """Returns the peak memory of `run` in bytes, beyond what was allocated before it.

    Measured by the CUDA allocator, or by Linux for the whole process; -1 if neither is available.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        baseline = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - baseline
    if not (PROC_SELF / "clear_refs").exists():
        run()
        return -1
    release_freed_memory()
    (PROC_SELF / "clear_refs").write_text("5")  # resets the peak, VmHWM
    baseline = read_status_bytes("VmRSS")
    run()
    return max(read_status_bytes("VmHWM") - baseline, 0)


def release_freed_memory() -> None:
    """Returns freed memory to the system; if the process kept it, it would hide what the next run allocates.

    Only glibc has a function for this; with other C libraries, this only collects garbage.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def read_status_bytes(name: str) -> int:
    """Reads a memory counter of this process, such as VmRSS, in bytes."""
    line = next(line for line in (PROC_SELF / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
