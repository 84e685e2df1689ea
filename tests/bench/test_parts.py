"""Parts of a run, on a simulated clock and device."""

from types import SimpleNamespace

import pytest
import torch

from lightning_mvar.bench import parts
from lightning_mvar.bench.parts import PartTracker, Stopwatch

CPU = torch.device("cpu")


def test_a_part_excludes_the_parts_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # each reading takes a second
    monkeypatch.setattr(parts, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    class Work:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None:
            pass

    work, watch = Work(), Stopwatch(CPU)
    with watch.instrument([(work, "outer", "outer"), (work, "inner", "inner")]):
        work.outer()
        work.inner()
    work.outer()  # no longer instrumented
    assert watch.seconds() == {"outer": 2, "inner": 2}
    assert vars(work) == {}


def test_a_part_ends_when_its_call_raises() -> None:
    tracker = PartTracker()
    with pytest.raises(ZeroDivisionError), tracker.part("outer"), tracker.part("inner"):
        1 / 0  # noqa: B018
    assert tracker.innermost is None


def test_times_are_recorded_on_the_stream_of_the_measured_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    event = SimpleNamespace(record=recorded.append)
    cuda = SimpleNamespace(
        Event=lambda enable_timing: event, current_stream=lambda device=None: f"stream of {device or 'cuda:0'}"
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    with Stopwatch(torch.device("cuda:1")).part("part"):
        pass
    assert recorded == ["stream of cuda:1"] * 3
