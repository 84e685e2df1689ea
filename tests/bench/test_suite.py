"""The suite of one GPU: order, time budget, failures and shares, with measurements that are given."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_mvar.bench import suite as module
from lightning_mvar.bench.subjects import Setting, setting_record
from lightning_mvar.bench.suite import Benchmark, run_suite, suite
from lightning_mvar.cli.tables import Record
from lightning_mvar.models.costs import count_parameters

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that each measurement advances by 10 seconds; those of d24 run out of memory."""
    clock = SimpleNamespace(seconds=0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.seconds))

    def sample(setting: Setting, device: torch.device, repeats: int) -> Record:
        clock.seconds += 10
        if setting.size == "d24":
            raise torch.OutOfMemoryError("out of memory\nof 80 GiB")
        parameters = count_parameters(setting.network)
        numbers = {"images_per_s": 400.0, "network_s_per_image": 0.002, "flops_per_image": 10**12}
        record = setting_record("sample", setting, device) | {"parameters": parameters, "peak_memory_bytes": 10**9}
        return record | numbers | {"device": "NVIDIA H100 80GB HBM3"}

    monkeypatch.setitem(module.MEASURE, "sample", sample)
    return clock


@pytest.mark.usefixtures("clock")
def test_failures_and_the_time_budget_lose_no_result(tmp_path: Path) -> None:
    sizes = ("d16", "d24", "d12", "d20")
    benchmarks = [Benchmark("sample", Setting(size, batch_size=64), seconds=10) for size in sizes]
    benchmarks[2] = Benchmark("sample", Setting("d12", batch_size=64, precision="bfloat16"), seconds=10)
    records = run_suite(benchmarks, CPU, 30, tmp_path / "new")
    assert json.loads((tmp_path / "new/gpu.json").read_text()) == records
    first, failed, third, skipped = records
    assert failed["error"] == "OutOfMemoryError: out of memory"
    assert skipped["skipped"] == "no time left"
    assert "images_per_s" in third
    assert first["peak_share"] == pytest.approx(400e12 / 989e12)
    weights = 4 * count_parameters(Setting("d16").network)  # float32, read in each of ten steps
    assert first["bandwidth_share"] == pytest.approx(10 * weights / (0.002 * 64) / 3.35e12)
    halves = 2 * count_parameters(Setting("d12").network)  # bfloat16
    assert third["bandwidth_share"] == pytest.approx(10 * halves / (0.002 * 64) / 3.35e12)
    table = (tmp_path / "new/gpu.md").read_text()
    assert "| sample, mvar d16, 256 px, batch 64, graphs, float32 | 400 | 500 | 160 | 40.4% |" in table
    assert "out of memory" in table
    assert table.splitlines()[-1].startswith(
        "| sample, mvar d20, 256 px, batch 64, graphs, float32 | not run: no time left"
    )


def test_results_are_written_before_the_next_benchmark_begins(clock: SimpleNamespace, tmp_path: Path) -> None:
    seen: list[int] = []

    def train(setting: Setting, device: torch.device, repeats: int) -> Record:
        seen.append(len(json.loads((tmp_path / "gpu.json").read_text())))
        raise KeyboardInterrupt

    module.MEASURE, before = module.MEASURE | {"train": train}, module.MEASURE
    try:
        with pytest.raises(KeyboardInterrupt):
            run_suite([Benchmark("sample", Setting()), Benchmark("train", Setting())], CPU, 60, tmp_path)
    finally:
        module.MEASURE = before
    assert seen == [1]


def test_the_suite_covers_what_the_documentation_of_speed_needs() -> None:
    settings = [(b.what, b.setting.size, b.setting.mixer, b.setting.batch_size, b.setting.graphs) for b in suite()]
    for size, mixer in (("d16", "mvar"), ("d24", "mvar"), ("d16", "var"), ("d30", "var")):
        for batch_size in (1, 25, 64):
            for graphs in (True, False):
                assert ("sample", size, mixer, batch_size, graphs) in settings
    trained = {(b.setting.size, b.setting.compile) for b in suite() if b.what == "train" and b.setting.mixer == "mvar"}
    assert trained == {(size, compile) for size in ("d12", "d16") for compile in (False, True)}
    assert {b.setting.resolution for b in suite()} == {256, 512, 1024}
    assert len(set(suite())) == len(suite())
