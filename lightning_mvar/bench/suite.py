"""A fixed list of benchmarks for one GPU, most important first, within a time limit.

Each result is written to disk before the next benchmark starts, so losing the GPU costs only the one in progress.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from lightning_mvar.bench.networks import measure_sampling, measure_training
from lightning_mvar.bench.peaks import peak_of
from lightning_mvar.bench.subjects import Setting
from lightning_mvar.bench.tokenizing import measure_encoding
from lightning_mvar.cli.tables import Record
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.json_files import write_json

MEASURE: dict[str, Callable[[Setting, torch.device, int], Record]] = {
    "sample": lambda setting, device, repeats: measure_sampling([setting], device, repeats)[0],
    "train": lambda setting, device, repeats: measure_training([setting], device, repeats)[0],
    "tokenize": measure_encoding,
}


@dataclass(frozen=True)
class Benchmark:
    """One entry of the suite.

    Args:
        what: the kind of measurement.
        setting: network, batch size and precision to measure.
        seconds: estimated duration on an H100; the benchmark is skipped if less time is left.
        repeats: number of measured runs.
    """

    what: Literal["sample", "train", "tokenize"]
    setting: Setting
    seconds: float = 10
    repeats: int = 3

    def tiny(self) -> Benchmark:
        """Returns a version that takes seconds on a CPU; its numbers mean nothing."""
        shape = {"size": "d12", "depth": 1, "batch_size": 1, "resolution": 256}
        setting = replace(self.setting, narrow=True, compile=False, **shape)  # type: ignore[arg-type]
        return replace(self, setting=setting, seconds=0, repeats=1)


def suite() -> list[Benchmark]:
    """Lists the benchmarks, most important first: bfloat16, CUDA graphs unless stated, M-VAR and VAR side by side."""

    def sampling(size: str, mixer: str, batch_size: int, resolution: int = 256, graphs: bool = True) -> Benchmark:
        return Benchmark("sample", Setting(size, mixer, resolution, batch_size, "bfloat16", graphs=graphs))

    def training(size: str, mixer: str, compile: bool = False) -> Benchmark:
        setting = Setting(size, mixer, 256, 32, "bfloat16", compile=compile)
        return Benchmark("train", setting, seconds=75 if compile else 10)

    pairs = [("d16", "mvar"), ("d16", "var"), ("d24", "mvar"), ("d30", "var")]
    return [
        *(sampling(size, mixer, 64) for size, mixer in pairs),
        *(sampling(size, mixer, 1) for size, mixer in pairs),
        *(training(size, mixer) for size, mixer in (("d16", "mvar"), ("d16", "var"), ("d12", "mvar"))),
        *(sampling(size, mixer, b, graphs=False) for b in (64, 1) for size, mixer in pairs),
        Benchmark("tokenize", Setting("d16", "mvar", 256, 64, "float32")),
        Benchmark("tokenize", Setting("d16", "mvar", 256, 64, "bfloat16")),
        *(sampling("d16", mixer, 4, side) for side in (256, 512, 1024) for mixer in ("mvar", "var")),
        *(sampling(size, mixer, 25) for size, mixer in pairs),
        *(training(size, "mvar", compile=True) for size in ("d12", "d16")),
        *(sampling(size, mixer, 25, graphs=False) for size, mixer in pairs),
    ]


def run_suite(benchmarks: list[Benchmark], device: torch.device, seconds: float, folder: Path) -> list[Record]:
    """Runs benchmarks until the time is up, and writes `gpu.json` and `gpu.md` into `folder` after each.

    The record of a failed benchmark has the key `error`, that of a skipped one `skipped`; the others are not affected.
    """
    deadline, records = time.monotonic() + seconds, []
    for benchmark in tqdm(benchmarks, desc="benchmarks", unit="", leave=False):
        record: Record = {"what": benchmark.what, **vars(benchmark.setting)}
        if time.monotonic() + benchmark.seconds > deadline:
            record["skipped"] = "no time left"
        else:
            record |= measure(benchmark, device)
        records.append(record)
        write_json(folder / "gpu.json", records)
        with atomic_path(folder / "gpu.md") as path:
            path.write_text("\n".join(markdown(records)) + "\n")
    return records


def measure(benchmark: Benchmark, device: torch.device) -> Record:
    """Runs one benchmark; returns its record with shares of the GPU's peak rates, or with the error that it raised."""
    try:
        record = MEASURE[benchmark.what](benchmark.setting, device, benchmark.repeats)
    except Exception as error:  # whatever failed on this GPU or version of torch, the other benchmarks can still run
        record = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    else:
        record |= peak_shares(record, benchmark.setting)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return record


def peak_shares(record: Record, setting: Setting) -> Record:
    """Returns the share of the GPU's peak FLOP/s and, in sampling, of its bandwidth that reading the weights takes.

    Each step reads all weights at least once. Empty if the GPU is unknown.
    """
    peak = peak_of(record["device"])
    if peak is None:
        return {}
    shares = {"peak_share": record["images_per_s"] * record["flops_per_image"] / peak.flops_per_s}
    if record["what"] == "sample":
        steps = len(setting.network.step_lengths) / record["network_s_per_image"] / setting.batch_size
        shares["bandwidth_share"] = steps * record["parameters"] * setting.dtype.itemsize / peak.bytes_per_s
    return shares


def markdown(records: list[Record]) -> Iterator[str]:
    """Yields the lines of a table for docs/performance.md."""
    measured = [record for record in records if "device" in record]
    if measured:
        yield f"{measured[0]['device']}, torch {measured[0]['torch']}, bfloat16 unless stated:\n"
    columns = ("images/s", "without decoder", "ms per batch", "of peak FLOP/s", "of bandwidth", "memory excl. weights")
    yield f"| | {' | '.join(columns)} |"
    yield "|" + "---|" * (len(columns) + 1)
    for record in records:
        if "device" not in record:
            cells = [record.get("error", "not run: no time left"), *[""] * (len(columns) - 1)]
        else:
            network_seconds = record.get("network_s_per_image")
            cells = [
                f"{record['images_per_s']:.4g}",
                f"{1 / network_seconds:.4g}" if network_seconds else "",
                f"{1000 * record['batch_size'] / record['images_per_s']:.4g}",
                percent(record.get("peak_share")),
                percent(record.get("bandwidth_share")),
                f"{record['peak_memory_bytes'] / 1e9:.3g} GB" if "peak_memory_bytes" in record else "",
            ]
        yield f"| {describe(record)} | {' | '.join(cells)} |"


def describe(record: Record) -> str:
    """Returns the name of a benchmark, such as "sample, mvar d16, 256 px, batch 64, graphs"."""
    words = [f"{record['what']}"]
    if record["what"] != "tokenize":
        words.append(f"{record['mixer']} {record['size']}")
    words.append(f"{record['resolution']} px, batch {record['batch_size']}")
    if record["what"] == "sample":
        words.append("graphs" if record["graphs"] else "eager")
    if record["compile"]:
        words.append("compiled")
    if record["precision"] != "bfloat16":
        words.append(record["precision"])
    return ", ".join(words)


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
