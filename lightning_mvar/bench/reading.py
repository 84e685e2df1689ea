"""Speed of reading token shards."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

from lightning_mvar.bench.measure import peak_memory
from lightning_mvar.bench.subjects import Setting
from lightning_mvar.cli.tables import Record
from lightning_mvar.data.tokens.manifest import Manifest, shard_name
from lightning_mvar.data.tokens.shards import write_shard
from lightning_mvar.data.tokens.sources import LocalShards, ShardSource
from lightning_mvar.data.tokens.stream import TokenLoader, TokenStream

SHARD_SIZE = 10_000  # samples per random shard


def measure_data(
    settings: list[Setting], num_workers: int, repeats: int, world_size: int, samples: int = 50_000
) -> list[Record]:
    """Measures shuffled passes over shards of random tokens, at least two global batches, in a temporary folder."""
    records = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as name:
            write_random_shards(Path(name), setting, max(samples, 2 * setting.batch_size * world_size))
            record = measure_reading(LocalShards(Path(name)), setting.batch_size, num_workers, repeats, world_size)
        del record["first_pass_samples_per_s"]  # meaningless: the files have just been written
        records.append(record)
    return records


def measure_reading(shards: ShardSource, batch_size: int, num_workers: int, repeats: int, world_size: int) -> Record:
    """Measures a first shuffled pass over shards, which may download them, and further passes.

    Args:
        shards: the shards.
        batch_size: samples per rank and batch.
        num_workers: reader processes.
        repeats: number of further passes.
        world_size: number of ranks; this process reads the share of the middle one.
    """
    manifest = shards.manifest()
    stream = TokenStream(shards, manifest, batch_size, 0, 16_384, world_size // 2, world_size)
    loader = TokenLoader(stream, num_workers, pin_memory=torch.cuda.is_available())
    times, first_batch_seconds = list[float](), list[float]()

    def read() -> None:
        begin = time.perf_counter()
        for i, _batch in enumerate(loader):
            if i == 0:
                first_batch_seconds.append(time.perf_counter() - begin)
        times.append(time.perf_counter() - begin)

    peak = peak_memory(read, torch.device("cpu"))
    for _ in tqdm(range(repeats), desc="bench", unit="pass", leave=False):
        read()
    samples_read = len(stream) * batch_size
    return {
        "what": "data",
        "tokens": manifest.schedule.num_tokens,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "world_size": world_size,
        "samples": samples_read,
        "first_pass_samples_per_s": samples_read / times[0],
        "samples_per_s": samples_read / median(times[1:]),
        "global_samples_per_s": world_size * samples_read / median(times[1:]),
        "first_batch_s": max(first_batch_seconds[1:]),
        "peak_memory_bytes": peak,
    }


def write_random_shards(folder: Path, setting: Setting, samples: int) -> None:
    config, rng = setting.network, np.random.default_rng(0)
    names = [str(label) for label in range(config.num_classes)]
    manifest = Manifest(
        list(config.schedule.side_lengths), config.vocab_size, names, "random", "bench", samples, SHARD_SIZE
    )
    for index, begin in enumerate(range(0, samples, SHARD_SIZE)):
        count = min(SHARD_SIZE, samples - begin)
        tokens = rng.integers(0, config.vocab_size, (count, config.schedule.num_tokens), dtype=np.uint16)
        labels, keys = rng.integers(0, config.num_classes, count), [str(begin + i) for i in range(count)]
        manifest.shards.append(write_shard(folder / shard_name(index), tokens, labels, keys))
    manifest.save(folder)
