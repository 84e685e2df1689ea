"""Counting and timing against what is known beforehand."""

from types import SimpleNamespace

import pytest
import torch

from lightning_mvar.bench import measure
from lightning_mvar.bench.measure import Stopwatch, alternate, large_matmul, peak_memory
from lightning_mvar.models.costs import count_flops

CPU = torch.device("cpu")


def test_runs_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    seconds = alternate([lambda: order.append("a"), lambda: order.append("b")], 2, CPU)
    assert order == ["a", "b"] * 3
    assert [len(times) for times in seconds] == [2, 2]


def test_operations_are_counted() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    product, flops = large_matmul(torch.float32, CPU, seconds=0.0)
    assert flops == count_flops(product)


def test_the_peak_is_what_a_run_holds_at_most() -> None:
    size = 64 * 2**20
    held = peak_memory(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert 0.9 * size < held < 1.5 * size


def test_what_an_earlier_run_has_freed_does_not_hide_what_the_next_one_takes() -> None:
    blocks, size = 1024, 2**16  # too small for mappings of their own

    def fill() -> list[torch.Tensor]:
        return [torch.ones(size, dtype=torch.uint8) for _ in range(blocks)]

    filled = fill()
    above = filled[-1]  # as long as it lives, the heap cannot shrink
    del filled
    assert peak_memory(fill, CPU) > 0.9 * blocks * size
    assert above.all()


def test_a_part_does_not_count_what_is_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # every look at it takes a second
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    class Work:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None:
            pass

    work, watch = Work(), Stopwatch(CPU)
    with watch.watching([(work, "outer", "outer"), (work, "inner", "inner")]):
        work.outer()
        work.inner()
    work.outer()  # not watched any more
    assert watch.seconds() == {"outer": 2, "inner": 2}
    assert vars(work) == {}
