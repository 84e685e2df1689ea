"""`bench-gpu` from its command line: a dry run, and tiny networks on a CPU."""

import json
from pathlib import Path

import pytest

from lightning_mvar.bench.suite import suite
from lightning_mvar.cli import run
from lightning_mvar.commands import bench_gpu


def test_a_dry_run_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench-gpu", "--dry_run", "true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  10 s  sample, mvar d16, 256 px, batch 64, graphs"
    assert len(lines) == len(suite()) + 1


def test_each_kind_of_benchmark_runs_on_a_cpu_with_tiny_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {benchmark.what: benchmark for benchmark in suite()}
    monkeypatch.setattr(bench_gpu, "suite", kinds.values)
    assert run(["bench-gpu", "--tiny", "true", "--device", "cpu", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "gpu.json").read_text())
    assert [record["what"] for record in records] == list(kinds)
    assert all(record["images_per_s"] > 0 and record["flops_per_image"] > 0 for record in records)
    assert capsys.readouterr().out.strip() == (tmp_path / "gpu.md").read_text().strip()


def test_a_cpu_is_refused_without_tiny_networks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench-gpu", "--device", "cpu"]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err
