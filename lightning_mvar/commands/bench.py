"""`bench`: speed and memory of networks of a published size on this machine, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_mvar.bench.launches import measure_launches
from lightning_mvar.bench.networks import (
    measure_memory,
    measure_operations,
    measure_sampling,
    measure_step,
    measure_training,
    profile_sampling,
)
from lightning_mvar.bench.reading import measure_data, measure_reading
from lightning_mvar.bench.subjects import Setting
from lightning_mvar.bench.tokenizing import measure_tokenizing
from lightning_mvar.cli.arguments import refuse_overwriting
from lightning_mvar.cli.tables import Record, print_table, write_records
from lightning_mvar.data.tokens.sources import SHARD_CACHE, open_shards
from lightning_mvar.devices import Precision, choose_device, set_tf32
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.scales import PUBLISHED_SIDE_LENGTHS

Measurement = Literal["sample", "step", "train", "tokenize", "data", "memory", "op", "launches"]


def bench(
    what: Measurement,
    size: str = "d16",
    mixer: str = "mvar",
    resolution: int = 256,
    batch_size: int = 4,
    precision: Precision = "float32",
    depth: int = 0,
    compile: bool = False,
    graphs: bool = True,
    guidance_off_from: int | None = None,
    versus: str | None = None,
    repeats: int = 3,
    num_workers: int = 1,
    world_size: int = 1,
    device: str = "auto",
    profile: bool = False,
    images: str | None = None,
    shards: str | None = None,
    cache_dir: str = SHARD_CACHE,
    json: str | None = None,
) -> None:
    """Measures speed and memory. `lightning-mvar bench WHAT` is short for `bench --what WHAT`.

    sample: guided sampling, network and decoder. step: the last scale alone, from the preceding state and without
    guidance, and the size of that state. train: a training step of forward, backward, clipping and AdamW. tokenize:
    images to tokens with the published encoder. data: reading shards. memory: the state that sampling carries from
    scale to scale. op: the parts of one block, and Mamba in sampling with and without carried state. launches: kernel
    launches, copies and host waits in sampling a batch and in a training step; on a CPU, networks are narrowed to width
    64, because counts do not depend on the width. Times are medians of interleaved runs. `matmul_share` is the rate of
    all counted FLOPs divided by that of a large matrix product in the same precision, measured in the same run.

    Args:
        what: the measurement.
        size: d12, d16, d20, d24, d30, d32 or d36.
        mixer: mvar (attention within scales, Mamba-2 across), var (block-causal attention), markov (attention to the
            previous scale), mamba_only, attention_only (within scales), ar_raster (causal attention over tokens), or
            the mixers of one block joined with +, such as scale_attention+mamba1.
        resolution: 256, 512 or 1024 pixels.
        batch_size: number of images per batch.
        precision: precision of sampling; in training, weights stay float32 and matrix products use this precision.
        depth: number of blocks; fewer measure a large size in less time; 0 for the depth of the size.
        compile: in training, compile each block with torch.compile, which takes minutes.
        graphs: in sampling on CUDA, launch each scale as one CUDA graph (`launches` and --profile never do).
        guidance_off_from: in sampling, index of the first scale that is drawn without guidance.
        versus: second setting to compare with, such as `mixer=var` or `size=d24,batch_size=1`.
        repeats: number of measured runs, after one warm-up run.
        num_workers: number of reader processes of `data` and `tokenize`.
        world_size: number of ranks of a simulated run, one of which `data` measures.
        device: auto, cpu, cuda or cuda:N.
        profile: also show each part's share of the time (`sample` only).
        images: images for `tokenize`, as for `lightning-mvar tokenize`.
        shards: token shards for `data` to read instead of random ones, as for `data.train` of `fit`; remote shards are
            downloaded in a first pass, which is measured separately.
        cache_dir: folder that caches remote shards of `data`.
        json: file to write the table to, as JSON.
    """
    require_in("[1, inf)", "--", repeats=repeats, world_size=world_size)
    require_in("[0, inf)", "--", num_workers=num_workers)
    refuse_overwriting({"--json": json}, {"--shards": shards, "--images": images})
    for option, given, allowed in (("world_size", world_size > 1, "data"), ("compile", compile, "train")):
        if given and what != allowed:
            raise InputError(f"--{option} works only with `bench {allowed}`")
    if profile and what != "sample":
        raise InputError("--profile works only with `bench sample`")
    if shards is not None and (what != "data" or versus is not None):
        raise InputError("--shards works only with `bench data` without --versus")
    if (images is not None) != (what == "tokenize"):
        raise InputError("`bench tokenize` needs --images; no other measurement takes it")
    first = Setting(
        size, mixer, resolution, batch_size, precision, depth, compile, graphs, guidance_off_from=guidance_off_from
    )
    settings = [first] if versus is None else [first, first.with_changes(versus)]
    if len({setting.precision == "tf32" for setting in settings}) > 1:
        raise InputError("--versus: tf32 applies to a whole run, so compare it with other precisions in two runs")
    set_tf32(precision == "tf32")
    torch_device = choose_device(device)
    measurements: dict[Measurement, Callable[[], list[Record]]] = {
        "sample": lambda: measure_sampling(settings, torch_device, repeats),
        "step": lambda: measure_step(settings, torch_device, repeats),
        "train": lambda: measure_training(settings, torch_device, repeats),
        "tokenize": lambda: [measure_tokenizing(str(images), s, num_workers, torch_device, repeats) for s in settings],
        "data": lambda: (
            measure_data(settings, num_workers, repeats, world_size)
            if shards is None
            else [measure_reading(open_shards(shards, cache_dir), batch_size, num_workers, repeats, world_size)]
        ),
        "memory": lambda: [measure_memory(s, side) for s in settings for side in PUBLISHED_SIDE_LENGTHS],
        "op": lambda: [record for s in settings for record in measure_operations(s, torch_device, repeats)],
        "launches": lambda: [record for s in settings for record in measure_launches(s, torch_device)],
    }
    records = measurements[what]()
    print_table(records)
    if profile:
        for setting in settings:
            print()
            print_table(profile_sampling(setting, torch_device))
    if json is not None:
        write_records(records, json)
