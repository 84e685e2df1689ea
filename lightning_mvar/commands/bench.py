"""`bench`: how fast networks of a published size run on this machine, and where the time goes. Random weights serve."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from lightning_mvar.bench.measure import Run, Stopwatch, alternate, large_matmul, peak_memory
from lightning_mvar.bench.subjects import Setting, Subject, flops_per_image, operations
from lightning_mvar.bench.tokenizing import measure_tokenizing
from lightning_mvar.cli.arguments import call
from lightning_mvar.cli.tables import Record, print_table, write_records
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.data.tokens.shards import Manifest, shard_name, write_shard
from lightning_mvar.data.tokens.sources import SHARD_CACHE, LocalShards, ShardSource, open_shards
from lightning_mvar.data.tokens.stream import TokenLoader, TokenStream
from lightning_mvar.devices import Precision, choose_device
from lightning_mvar.errors import InputError
from lightning_mvar.models.costs import state_bytes
from lightning_mvar.sampling.generate import compile_steps
from lightning_mvar.scales import PUBLISHED_SIDE_LENGTHS


def bench(
    what: Literal["sample", "train", "tokenize", "data", "memory", "op"],
    size: str = "d16",
    mixer: str = "mvar",
    resolution: int = 256,
    batch_size: int = 4,
    precision: Precision = "float32",
    depth: int = 0,
    compile: bool = False,
    versus: str | None = None,
    repeats: int = 3,
    num_workers: int = 1,
    device: str = "auto",
    profile: bool = False,
    images: str | None = None,
    shards: str | None = None,
    cache_dir: str = SHARD_CACHE,
    json: str | None = None,
) -> None:
    """Measure. `lightning-mvar bench WHAT` is short for `bench --what WHAT`.

    sample: images with guidance, by network and decoder. train: a step of forward, backward, clipping and AdamW.
    tokenize: images to tokens, by the published encoder. data: reading shards. memory: what sampling carries from scale
    to scale. op: the parts of one block, and Mamba in sampling with and without its state. Times are medians of runs
    in turns; `matmul_share` is the rate of all counted operations over that of this machine's fastest large matrix
    product in the same precision, measured in the same run.

    Args:
        what: to measure.
        size: d12, d16, d20, d24, d30, d32 or d36.
        mixer: mvar (attention inside scales, Mamba-2 across), var (block-causal attention), markov (attention to the
            scale before), mamba_only, attention_only (inside scales), ar_raster (causal attention token by token), or
            the mixers of a block by name, such as scale_attention+mamba1.
        resolution: 256, 512 or 1024 pixels.
        batch_size: images at once.
        precision: of sampling; in training, weights stay in float32 and products are in this precision.
        depth: blocks, instead of the size's own: to measure a large size in little time. 0 for the size's own.
        compile: with torch.compile, which takes minutes: each scale of sampling, each block of training.
        versus: measure another setting in turns with the first, such as `mixer=var` or `size=d24,batch_size=1`.
        repeats: runs of each that count, after one that does not.
        num_workers: of `data` and `tokenize`: processes that read.
        device: auto, cpu, cuda or cuda:N.
        profile: also show the share of each part in the time (of sample).
        images: of `tokenize`: the images, named as for `lightning-mvar tokenize`.
        shards: of `data`: token shards to read instead of random ones, named as for `data.train` of `fit`; from
            elsewhere they come in a first pass, which is measured apart.
        cache_dir: of `data`: folder that keeps shards from elsewhere.
        json: file for what the table shows.
    """
    if repeats < 1 or num_workers < 0:
        raise InputError("--repeats must be at least 1, --num_workers not negative")
    if profile and (compile or what != "sample"):
        raise InputError("--profile is of `bench sample` without --compile")
    if shards is not None and (what != "data" or versus is not None):
        raise InputError("--shards is of `bench data` without --versus")
    if (images is not None) != (what == "tokenize"):
        raise InputError("`bench tokenize` needs --images, which nothing else takes")
    first = Setting(size, mixer, resolution, batch_size, precision, depth, compile)
    settings = [first] if versus is None else [first, first.changed(versus)]
    where = choose_device(device)
    if images is not None:
        records = [measure_images(images, setting, num_workers, where, repeats) for setting in settings]
    elif shards is not None:
        records = [measure_reading(open_shards(shards, cache_dir), batch_size, num_workers, repeats)]
    elif what == "data":
        records = measure_data(settings, num_workers, repeats)
    elif what == "memory":
        records = [measure_memory(setting, side) for setting in settings for side in PUBLISHED_SIDE_LENGTHS]
    elif what == "op":
        records = [record for setting in settings for record in measure_operations(setting, where, repeats)]
    else:
        records = {"sample": measure_sampling, "train": measure_training}[what](settings, where, repeats)
    print_table(records)
    if profile:
        for setting in settings:
            print()
            print_table(profile_sampling(setting, where))
    if json is not None:
        write_records(records, json)


def measure_sampling(settings: list[Setting], device: torch.device, repeats: int) -> list[Record]:
    subjects = [make_subject(setting, device) for setting in settings]
    for setting, subject in zip(settings, subjects, strict=True):
        if setting.compile:
            compile_steps(subject.network)
    parts_of: list[list[dict[str, float]]] = [[] for _ in settings]  # seconds of the parts in each run

    def watched(subject: Subject, parts: list[dict[str, float]]) -> Run:
        watching = [(subject.network, "step", "network"), (subject.tokenizer, "decode_features", "decoder")]

        def run() -> None:
            watch = Stopwatch(device)
            with watch.watching(watching):
                subject.sample()
            parts.append(watch.seconds())

        return run

    runs = [watched(subject, parts) for subject, parts in zip(subjects, parts_of, strict=True)]
    peaks = [peak_memory(run, device) for run in runs]
    seconds, rates = beside_matmuls(settings, runs, repeats, device)
    records = []
    for setting, times, counted, subject, peak in zip(settings, seconds, parts_of, subjects, peaks, strict=True):
        flops = flops_per_image(setting.network, setting.tokenizer)
        per_image = median(times) / setting.batch_size
        total = flops["sampling"] + flops["decoder"]
        parts = {
            f"{name}_s_per_image": median(run[name] for run in counted[-repeats:]) / setting.batch_size
            for name in ("network", "decoder")
        }
        records.append(
            about("sample", setting, device)
            | {
                "images_per_s": 1 / per_image,
                "tokens_per_s": setting.network.schedule.num_tokens / per_image,
                **parts,
                "flops_per_image": total,
                "network_flops_per_image": flops["sampling"],
                "decoder_flops_per_image": flops["decoder"],
                "matmul_share": total / per_image / rates[setting.dtype],
                "matmul_flops_per_s": rates[setting.dtype],
                "peak_memory_bytes": peak,
                "state_bytes_per_image": state_bytes(setting.network, setting.dtype),
                "parameters": sum(p.numel() for p in subject.network.parameters()),
            }
        )
    return records


def measure_training(settings: list[Setting], device: torch.device, repeats: int) -> list[Record]:
    subjects = [make_subject(setting, device) for setting in settings]
    for setting, subject in zip(settings, subjects, strict=True):
        if setting.compile:
            for block in subject.network.blocks:
                block.compile()
    runs = [subject.training_step() for subject in subjects]
    peaks = [peak_memory(run, device) for run in runs]
    seconds, rates = beside_matmuls(settings, runs, repeats, device)
    records = []
    for setting, times, peak in zip(settings, seconds, peaks, strict=True):
        flops = 3 * flops_per_image(setting.network, setting.tokenizer)["forward"]  # a backward pass is two forwards
        per_image = median(times) / setting.batch_size
        records.append(
            about("train", setting, device)
            | {
                "images_per_s": 1 / per_image,
                "tokens_per_s": setting.network.schedule.num_tokens / per_image,
                "step_s": median(times),
                "flops_per_image": flops,
                "matmul_share": flops / per_image / rates[setting.dtype],
                "matmul_flops_per_s": rates[setting.dtype],
                "peak_memory_bytes": peak,
            }
        )
    return records


def measure_images(images: str, setting: Setting, num_workers: int, device: torch.device, repeats: int) -> Record:
    model = make_subject(setting.changed("precision=float32"), device).tokenizer
    source = open_images(images, (setting.resolution, setting.resolution), "skip")
    return measure_tokenizing(source, model, setting.batch_size, num_workers, setting.precision, device, repeats)


def beside_matmuls(
    settings: list[Setting], runs: list[Run], repeats: int, device: torch.device
) -> tuple[list[list[float]], dict[torch.dtype, float]]:
    """Seconds of the runs, and FLOP/s of a large product in each precision among them, measured in turns with them."""
    dtypes = list(dict.fromkeys(setting.dtype for setting in settings))
    products = [large_matmul(dtype, device) for dtype in dtypes]
    seconds = alternate([*runs, *(product for product, _ in products)], repeats, device)
    times = zip(dtypes, products, seconds[len(runs) :], strict=True)
    return seconds[: len(runs)], {dtype: flops / median(t) for dtype, (_, flops), t in times}


def measure_operations(setting: Setting, device: torch.device, repeats: int) -> list[Record]:
    shape = (setting.batch_size, setting.network.schedule.num_tokens, setting.network.width)
    x = torch.randn(shape, device=device, dtype=setting.dtype)
    names, runs, trains = zip(*operations(setting.network, x), strict=True)
    seconds = [median(times) for times in alternate(list(runs), repeats, device)]
    records = []
    for name, time_of, training in zip(names, seconds, trains, strict=True):
        what = "forward and backward" if training else "sampling"
        record = about("op", setting, device) | {"op": name, "seconds": time_of, "of": what}
        records.append(record | ({"share_of_block": time_of / seconds[0]} if training else {}))
    return records


def measure_memory(setting: Setting, resolution: int) -> Record:
    at = setting.changed(f"resolution={resolution}")
    return {
        "what": "memory",
        "size": at.size,
        "mixer": at.mixer,
        "resolution": resolution,
        "precision": at.precision,
        "tokens": at.network.schedule.num_tokens,
        "state_bytes_per_image": state_bytes(at.network, at.dtype),
    }


def measure_data(settings: list[Setting], num_workers: int, repeats: int, samples: int = 50_000) -> list[Record]:
    """Shuffled passes over shards of random tokens in a temporary folder."""
    records = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as name:
            write_random_shards(Path(name), setting, samples)
            record = measure_reading(LocalShards(Path(name)), setting.batch_size, num_workers, repeats)
        del record["first_pass_samples_per_s"]  # of files that have just been written
        records.append(record)
    return records


def measure_reading(shards: ShardSource, batch_size: int, num_workers: int, repeats: int) -> Record:
    """A shuffled pass over shards that may have to come from elsewhere, and others after it."""
    manifest = shards.manifest()
    stream = TokenStream(shards, manifest, batch_size, 0, 16_384, 0, 1)
    loader = TokenLoader(stream, num_workers, pin_memory=torch.cuda.is_available())
    times, firsts = [], []
    for _ in tqdm(range(repeats + 1), desc="bench", unit="pass", leave=False):
        begin = time.perf_counter()
        for i, _batch in enumerate(loader):
            if i == 0:
                firsts.append(time.perf_counter() - begin)
        times.append(time.perf_counter() - begin)
    read = len(stream) * batch_size
    return {
        "what": "data",
        "tokens": manifest.schedule.num_tokens,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "samples": read,
        "first_pass_samples_per_s": read / times[0],
        "samples_per_s": read / median(times[1:]),
        "first_batch_s": max(firsts[1:]),
    }


def write_random_shards(folder: Path, setting: Setting, samples: int, per_shard: int = 10_000) -> None:
    config, rng = setting.network, np.random.default_rng(0)
    names = [str(label) for label in range(config.num_classes)]
    manifest = Manifest(
        list(config.schedule.side_lengths), config.vocab_size, names, "random", "bench", samples, per_shard
    )
    for index, begin in enumerate(range(0, samples, per_shard)):
        count = min(per_shard, samples - begin)
        tokens = rng.integers(0, config.vocab_size, (count, config.schedule.num_tokens), dtype=np.uint16)
        labels, keys = rng.integers(0, config.num_classes, count), [str(begin + i) for i in range(count)]
        manifest.shards.append(write_shard(folder / shard_name(index), tokens, labels, keys))
    manifest.save(folder)


def profile_sampling(setting: Setting, device: torch.device) -> list[Record]:
    """Seconds of each part of one run after a first, and its share; parts do not count what is inside them."""
    subject = make_subject(setting, device)
    subject.sample()
    watch = Stopwatch(device)
    with watch.watching(subject.parts()), watch.part("the rest"):
        subject.sample()
    seconds = watch.seconds()
    total = sum(seconds.values())
    return [
        {"mixer": setting.mixer, "part": name, "seconds": s, "share": s / total}
        for name, s in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def make_subject(setting: Setting, device: torch.device) -> Subject:
    return Subject(setting.network, setting.tokenizer, setting.batch_size, setting.dtype, device)


def about(what: str, setting: Setting, device: torch.device) -> Record:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "what": what,
        **asdict(setting),
        "depth": setting.network.depth,
        "device": where,
        "torch": torch.__version__,
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1 and not argv[1].startswith("-"):
        argv = [argv[0], "--what", *argv[1:]]
    call(bench, argv)
