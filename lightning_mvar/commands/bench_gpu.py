"""`bench-gpu`: a fixed list of benchmarks for one GPU, with the reached shares of its peak."""

from __future__ import annotations

from pathlib import Path

from lightning_mvar.bench.suite import describe, markdown, run_suite, suite
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError


def bench_gpu(
    out: str = "outputs/gpu", minutes: float = 4, dry_run: bool = False, tiny: bool = False, device: str = "auto"
) -> None:
    """Measures sampling, training, tokenizing and memory on one GPU, most important first, until the time is up.

    Writes OUT/gpu.json and OUT/gpu.md, a table, after each benchmark. Exits with 1 if one failed.

    Args:
        out: folder for the results.
        minutes: time for all benchmarks; those that no longer fit are left out.
        dry_run: only list the benchmarks with their estimated seconds.
        tiny: run networks of one narrow block instead, to test the command, also on a CPU.
        device: auto, cuda or cuda:N; with `--tiny true` also cpu.
    """
    benchmarks = suite()
    if dry_run:
        for benchmark in benchmarks:
            record = {"what": benchmark.what, **vars(benchmark.setting)}
            print(f"{benchmark.seconds:4.0f} s  {describe(record)}")
        print(f"{sum(benchmark.seconds for benchmark in benchmarks):4.0f} s  in total, of {60 * minutes:.0f} s")
        return
    torch_device = choose_device(device)
    if tiny:
        benchmarks = list(dict.fromkeys(benchmark.tiny() for benchmark in benchmarks))
    elif torch_device.type != "cuda":
        raise InputError("bench-gpu needs a CUDA GPU; `--tiny true` also runs on a CPU, `--dry_run true` only lists")
    records = run_suite(benchmarks, torch_device, 60 * minutes, Path(out))
    print("\n".join(markdown(records)))
    failed = sum("error" in record for record in records)
    if failed:
        raise InputError(f"{failed} of {len(records)} benchmarks failed; see `error` in {Path(out) / 'gpu.json'}")
