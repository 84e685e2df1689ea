"""FLOP counts, times and memory compared with known values."""

import torch

from lightning_mvar.bench.measure import large_matmul, peak_memory, time_interleaved
from lightning_mvar.models.costs import count_flops

CPU = torch.device("cpu")


def test_runs_are_interleaved_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    seconds = time_interleaved([lambda: order.append("a"), lambda: order.append("b")], 2, CPU)
    assert order == ["a", "b"] * 3
    assert [len(times) for times in seconds] == [2, 2]


def test_operations_are_counted() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    product, flops = large_matmul(torch.float32, CPU, seconds=0.0)
    assert flops == count_flops(product)


def test_peak_memory_is_the_most_that_a_run_holds() -> None:
    size = 64 * 2**20
    peak = peak_memory(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert 0.9 * size < peak < 1.5 * size


def test_memory_freed_by_an_earlier_run_does_not_hide_the_peak_of_the_next() -> None:
    blocks, size = 1024, 2**16  # too small for separate memory mappings

    def fill() -> list[torch.Tensor]:
        return [torch.ones(size, dtype=torch.uint8) for _ in range(blocks)]

    filled = fill()
    top = filled[-1]  # while this is alive, the heap cannot shrink
    del filled
    assert peak_memory(fill, CPU) > 0.9 * blocks * size
    assert top.all()
