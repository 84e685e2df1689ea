"""Parts of a run: which instrumented call is running, and the seconds spent in each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_mvar.bench.measure import synchronized_time

Part = tuple[Any, str, str]  # owner, attribute, name: calls of `owner.attribute` belong to the part `name`


class PartTracker:
    """Tracks the innermost part that is running. Parts are functions and methods wrapped by `instrument`."""

    def __init__(self) -> None:
        self.open_parts: list[str] = []

    @property
    def innermost(self) -> str | None:
        return self.open_parts[-1] if self.open_parts else None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.open_parts.append(name)
        try:
            yield
        finally:
            self.open_parts.pop()

    @contextmanager
    def instrument(self, parts: list[Part]) -> Iterator[None]:
        """Tracks calls of `owner.attribute` as part `name`, for each (owner, attribute, name)."""
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


class Stopwatch(PartTracker):
    """Profiler of the seconds spent in each part of a run, excluding the parts nested in it.

    CUDA is synchronized only when `seconds` is called.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.marks: list[tuple[str | None, Any]] = [(None, self.mark())]  # (part that ends here, time)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.marks.append((self.innermost, self.mark()))
        with super().part(name):
            yield
        self.marks.append((name, self.mark()))

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each part; time outside of all parts is not counted."""
        synchronized_time(self.device)
        total: dict[str, float] = defaultdict(float)
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            if name is not None:
                total[name] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        return dict(total)
