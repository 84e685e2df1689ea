"""Time, work and memory of anything that can be called."""

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

PROCESS = Path("/proc/self")


def alternate(runs: list[Run], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of `repeats` calls of each, in turns after a first round that does not count.

    Turns, because a machine that others use too is not equally fast all the time: ratios then hold where times do not.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    with tqdm(total=(repeats + 1) * len(runs), unit="run", desc="bench", leave=False) as bar:
        for turn in range(repeats + 1):
            for run, times in zip(runs, seconds, strict=True):
                taken = elapsed(run, device)
                if turn:
                    times.append(taken)
                bar.update()
    return seconds


def now(device: torch.device) -> float:
    """Seconds, after all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def large_matmul(dtype: torch.dtype, device: torch.device, seconds: float = 0.05) -> tuple[Run, int]:
    """A product of two large square matrices, the most that a network could reach here, and its operations.

    The matrices are doubled until a product takes `seconds`, so that a machine that only emulates `dtype` is not
    waited for.
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
    begin = now(device)
    run()
    return now(device) - begin


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes that `run` needs at most beyond what is held before it.

    Of the CUDA allocator, or of the process as Linux counts it; -1 where neither is known.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    if not (PROCESS / "clear_refs").exists():
        run()
        return -1
    give_back_freed_memory()
    (PROCESS / "clear_refs").write_text("5")  # the peak counts from here
    held = resident("VmRSS")
    run()
    return max(resident("VmHWM") - held, 0)


def give_back_freed_memory() -> None:
    """To the system, or it would stay with the process and hide what the next run takes.

    By glibc's own call; other C libraries have none.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(name: str) -> int:
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Stopwatch:
    """Where the time of a run goes: seconds inside each part, without the parts inside it.

    Parts are functions and methods, measured while `watching`; CUDA is not waited for until `seconds` is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: list[str] = []
        self.marks: list[tuple[str | None, Any]] = [(None, self.mark())]  # what was under way before each mark

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.marks.append((self.open[-1] if self.open else None, self.mark()))
        self.open.append(name)
        yield
        self.marks.append((self.open.pop(), self.mark()))

    @contextmanager
    def watching(self, parts: list[tuple[Any, str, str]]) -> Iterator[None]:
        """Measure calls of `owner.attribute` as the part of that name, for each (owner, attribute, name)."""
        before = [(owner, attribute, vars(owner).get(attribute)) for owner, attribute, _ in parts]
        for owner, attribute, name in parts:
            setattr(owner, attribute, self.watched(getattr(owner, attribute), name))
        try:
            yield
        finally:
            for owner, attribute, own in reversed(before):
                delattr(owner, attribute) if own is None else setattr(owner, attribute, own)

    def watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def seconds(self) -> dict[str, float]:
        """Of each part; what was in none is not counted."""
        now(self.device)
        total: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            if name is not None:
                total[name] += before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before
        return dict(total)
