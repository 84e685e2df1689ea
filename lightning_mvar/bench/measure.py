"""Measurement of the time, FLOPs and memory of any callable."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
    """Returns a product of two large square matrices, as the peak rate to compare with, and its FLOPs.

    The matrices double in size until a product takes `seconds`, so that a device that only emulates `dtype` does not
    take too long.
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
    """Returns the peak memory of `run` in bytes, beyond what is allocated before it.

    Measured by the CUDA allocator, or by Linux for the process; -1 if neither is available.
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
    """Returns freed memory to the system; kept in the process, it would hide what the next run allocates.

    Only glibc has a call for this; with other C libraries this only collects garbage.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def read_status_bytes(name: str) -> int:
    """Reads a memory counter of this process, such as VmRSS, in bytes."""
    line = next(line for line in (PROC_SELF / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Stopwatch:
    """Profiler of the seconds spent in each part of a run, excluding the parts nested in it.

    Parts are functions and methods, measured inside `instrument`. CUDA is synchronized only when `seconds` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open_parts: list[str] = []
        self.marks: list[tuple[str | None, Any]] = [(None, self.mark())]  # (part that ends here, time)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.marks.append((self.open_parts[-1] if self.open_parts else None, self.mark()))
        self.open_parts.append(name)
        yield
        self.marks.append((self.open_parts.pop(), self.mark()))

    @contextmanager
    def instrument(self, parts: list[tuple[Any, str, str]]) -> Iterator[None]:
        """Measures calls of `owner.attribute` as the part `name`, for each (owner, attribute, name)."""
        originals = [(owner, attribute, vars(owner).get(attribute)) for owner, attribute, _ in parts]
        for owner, attribute, name in parts:
            setattr(owner, attribute, self.instrumented(getattr(owner, attribute), name))
        try:
            yield
        finally:
            for owner, attribute, original in reversed(originals):
                delattr(owner, attribute) if original is None else setattr(owner, attribute, original)

    def instrumented(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each part; time outside of all parts is not counted."""
        synchronized_time(self.device)
        total: dict[str, float] = defaultdict(float)
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            if name is not None:
                total[name] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        return dict(total)
