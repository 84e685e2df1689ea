"""`bench`: speed and memory of networks of a published size on this machine, with random weights."""

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

from lightning_mvar.bench.measure import Run, Stopwatch, large_matmul, peak_memory, time_interleaved
from lightning_mvar.bench.subjects import Setting, Subject, block_operations, flops_per_image
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
    """Measures speed and memory. `lightning-mvar bench WHAT` is short for `bench --what WHAT`.

    sample: guided sampling, network and decoder. train: a training step of forward, backward, clipping and AdamW.
    tokenize: images to tokens with the published encoder. data: reading shards. memory: the state that sampling carries
    from scale to scale. op: the parts of one block, and Mamba in sampling with and without carried state. Times are
    medians of interleaved runs. `matmul_share` is the rate of all counted FLOPs divided by that of a large matrix
    product in the same precision, measured in the same run.

    Args:
        what: the measurement.
        size: d12, d16, d20, d24, d30, d32 or d36.
        mixer: mvar (attention inside scales, Mamba-2 across), var (block-causal attention), markov (attention to the
            scale before), mamba_only, attention_only (inside scales), ar_raster (causal attention token by token), or
            the mixers of a block joined by +, such as scale_attention+mamba1.
        resolution: 256, 512 or 1024 pixels.
        batch_size: number of images at once.
        precision: precision of sampling; in training, weights stay float32 and matrix products use this precision.
        depth: number of blocks, to measure a large size in little time; 0 for the depth of the size.
        compile: use torch.compile, which takes minutes: per scale in sampling, per block in training.
        versus: second setting, interleaved with the first, such as `mixer=var` or `size=d24,batch_size=1`.
        repeats: number of measured runs, after one warm-up run.
        num_workers: number of reader processes of `data` and `tokenize`.
        device: auto, cpu, cuda or cuda:N.
        profile: also show each part's share of the time (`sample` only).
        images: images for `tokenize`, given as for `lightning-mvar tokenize`.
        shards: token shards for `data` to read instead of random ones, given as for `data.train` of `fit`; remote
            shards are downloaded in a first pass, which is measured separately.
        cache_dir: folder that caches remote shards of `data`.
        json: file to write the table to, as JSON.
    """
    if repeats < 1 or num_workers < 0:
        raise InputError(f"--repeats {repeats} must be at least 1 and --num_workers {num_workers} at least 0")
    if profile and (compile or what != "sample"):
        raise InputError("--profile works only with `bench sample` without --compile")
    if shards is not None and (what != "data" or versus is not None):
        raise InputError("--shards works only with `bench data` without --versus")
    if (images is not None) != (what == "tokenize"):
        raise InputError("`bench tokenize` needs --images; no other measurement takes it")
    first = Setting(size, mixer, resolution, batch_size, precision, depth, compile)
    settings = [first] if versus is None else [first, first.with_changes(versus)]
    torch_device = choose_device(device)
    if images is not None:
        records = [measure_images(images, setting, num_workers, torch_device, repeats) for setting in settings]
    elif shards is not None:
        records = [measure_reading(open_shards(shards, cache_dir), batch_size, num_workers, repeats)]
    elif what == "data":
        records = measure_data(settings, num_workers, repeats)
    elif what == "memory":
        records = [measure_memory(setting, side) for setting in settings for side in PUBLISHED_SIDE_LENGTHS]
    elif what == "op":
        records = [record for setting in settings for record in measure_operations(setting, torch_device, repeats)]
    else:
        records = {"sample": measure_sampling, "train": measure_training}[what](settings, torch_device, repeats)
    print_table(records)
    if profile:
        for setting in settings:
            print()
            print_table(profile_sampling(setting, torch_device))
    if json is not None:
        write_records(records, json)


def measure_sampling(settings: list[Setting], device: torch.device, repeats: int) -> list[Record]:
    subjects = [make_subject(setting, device) for setting in settings]
    for setting, subject in zip(settings, subjects, strict=True):
        if setting.compile:
            compile_steps(subject.network)
    part_seconds: list[list[dict[str, float]]] = [[] for _ in settings]  # by setting, run and part

    def instrumented(subject: Subject, parts: list[dict[str, float]]) -> Run:
        timed_parts = [(subject.network, "step", "network"), (subject.tokenizer, "decode_features", "decoder")]

        def run() -> None:
            watch = Stopwatch(device)
            with watch.instrument(timed_parts):
                subject.sample()
            parts.append(watch.seconds())

        return run

    runs = [instrumented(subject, parts) for subject, parts in zip(subjects, part_seconds, strict=True)]
    peaks = [peak_memory(run, device) for run in runs]
    seconds, rates = time_with_matmul_reference(settings, runs, repeats, device)
    records = []
    for setting, times, run_parts, subject, peak in zip(settings, seconds, part_seconds, subjects, peaks, strict=True):
        flops = flops_per_image(setting.network, setting.tokenizer)
        per_image = median(times) / setting.batch_size
        total = flops["sampling"] + flops["decoder"]
        parts = {
            f"{name}_s_per_image": median(run[name] for run in run_parts[-repeats:]) / setting.batch_size
            for name in ("network", "decoder")
        }
        records.append(
            setting_record("sample", setting, device)
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
    seconds, rates = time_with_matmul_reference(settings, runs, repeats, device)
    records = []
    for setting, times, peak in zip(settings, seconds, peaks, strict=True):
        flops = 3 * flops_per_image(setting.network, setting.tokenizer)["forward"]  # a backward pass costs two forwards
        per_image = median(times) / setting.batch_size
        records.append(
            setting_record("train", setting, device)
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
    model = make_subject(setting.with_changes("precision=float32"), device).tokenizer
    source = open_images(images, (setting.resolution, setting.resolution), "skip")
    return measure_tokenizing(source, model, setting.batch_size, num_workers, setting.precision, device, repeats)


def time_with_matmul_reference(
    settings: list[Setting], runs: list[Run], repeats: int, device: torch.device
) -> tuple[list[list[float]], dict[torch.dtype, float]]:
    """Times the runs interleaved with a large matrix product per precision; returns their seconds and its FLOP/s."""
    dtypes = list(dict.fromkeys(setting.dtype for setting in settings))
    products = [large_matmul(dtype, device) for dtype in dtypes]
    seconds = time_interleaved([*runs, *(product for product, _ in products)], repeats, device)
    times = zip(dtypes, products, seconds[len(runs) :], strict=True)
    return seconds[: len(runs)], {dtype: flops / median(t) for dtype, (_, flops), t in times}


def measure_operations(setting: Setting, device: torch.device, repeats: int) -> list[Record]:
    shape = (setting.batch_size, setting.network.schedule.num_tokens, setting.network.width)
    x = torch.randn(shape, device=device, dtype=setting.dtype)
    names, runs, is_training = zip(*block_operations(setting.network, x), strict=True)
    seconds = [median(times) for times in time_interleaved(list(runs), repeats, device)]
    records = []
    for name, op_seconds, training in zip(names, seconds, is_training, strict=True):
        what = "forward and backward" if training else "sampling"
        record = setting_record("op", setting, device) | {"op": name, "seconds": op_seconds, "of": what}
        records.append(record | ({"share_of_block": op_seconds / seconds[0]} if training else {}))
    return records


def measure_memory(setting: Setting, resolution: int) -> Record:
    setting = setting.with_changes(f"resolution={resolution}")
    return {
        "what": "memory",
        "size": setting.size,
        "mixer": setting.mixer,
        "resolution": resolution,
        "precision": setting.precision,
        "tokens": setting.network.schedule.num_tokens,
        "state_bytes_per_image": state_bytes(setting.network, setting.dtype),
    }


def measure_data(settings: list[Setting], num_workers: int, repeats: int, samples: int = 50_000) -> list[Record]:
    """Measures shuffled passes over shards of random tokens in a temporary folder."""
    records = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as name:
            write_random_shards(Path(name), setting, samples)
            record = measure_reading(LocalShards(Path(name)), setting.batch_size, num_workers, repeats)
        del record["first_pass_samples_per_s"]  # meaningless: the files have just been written
        records.append(record)
    return records


def measure_reading(shards: ShardSource, batch_size: int, num_workers: int, repeats: int) -> Record:
    """Measures a first shuffled pass over shards, which may download them, and further passes."""
    manifest = shards.manifest()
    stream = TokenStream(shards, manifest, batch_size, 0, 16_384, 0, 1)
    loader = TokenLoader(stream, num_workers, pin_memory=torch.cuda.is_available())
    times, first_batch_seconds = [], []
    for _ in tqdm(range(repeats + 1), desc="bench", unit="pass", leave=False):
        begin = time.perf_counter()
        for i, _batch in enumerate(loader):
            if i == 0:
                first_batch_seconds.append(time.perf_counter() - begin)
        times.append(time.perf_counter() - begin)
    samples_read = len(stream) * batch_size
    return {
        "what": "data",
        "tokens": manifest.schedule.num_tokens,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "samples": samples_read,
        "first_pass_samples_per_s": samples_read / times[0],
        "samples_per_s": samples_read / median(times[1:]),
        "first_batch_s": max(first_batch_seconds[1:]),
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
    """Profiles one run after a warm-up run; returns the seconds and share of each part without the parts inside it."""
    subject = make_subject(setting, device)
    subject.sample()
    watch = Stopwatch(device)
    with watch.instrument(subject.parts()), watch.part("the rest"):
        subject.sample()
    seconds = watch.seconds()
    total = sum(seconds.values())
    return [
        {"mixer": setting.mixer, "part": name, "seconds": s, "share": s / total}
        for name, s in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def make_subject(setting: Setting, device: torch.device) -> Subject:
    return Subject(setting.network, setting.tokenizer, setting.batch_size, setting.dtype, device)


def setting_record(what: str, setting: Setting, device: torch.device) -> Record:
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "what": what,
        **asdict(setting),
        "depth": setting.network.depth,
        "device": device_name,
        "torch": torch.__version__,
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1 and not argv[1].startswith("-"):
        argv = [argv[0], "--what", *argv[1:]]
    call(bench, argv)
