"""Speed and memory of sampling, of a training step, and of the parts of one block."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from lightning_mvar.bench.measure import Run, large_matmul, peak_memory, time_interleaved
from lightning_mvar.bench.parts import Stopwatch
from lightning_mvar.bench.subjects import (
    Setting,
    Subject,
    block_operations,
    flops_per_image,
    make_subject,
    setting_record,
)
from lightning_mvar.cli.tables import Record
from lightning_mvar.errors import InputError
from lightning_mvar.models.costs import mixer_state_bytes, scale_flops, state_bytes
from lightning_mvar.sampling.costs import sampling_costs
from lightning_mvar.training.blocks import configure_block


def measure_sampling(settings: list[Setting], device: torch.device, repeats: int) -> list[Record]:
    subjects = [make_subject(setting, device) for setting in settings]
    part_seconds: list[list[dict[str, float]]] = [[] for _ in settings]  # by setting, run and part

    def instrumented(subject: Subject, parts: list[dict[str, float]]) -> Run:
        steps: tuple[Any, str] = (subject.network, "step") if subject.graphs is None else (subject.graphs, "replay")
        timed_parts = [(*steps, "network"), (subject.tokenizer, "decode_features", "decoder")]

        def run() -> None:
            watch = Stopwatch(device)
            with watch.instrument(timed_parts):
                subject.sample()
            parts.append(watch.seconds())

        return run

    runs = [instrumented(subject, parts) for subject, parts in zip(subjects, part_seconds, strict=True)]
    peaks = [peak_memory(run, device) for run in runs]
    for subject in subjects:
        if subject.graphs is not None:
            subject.sample()  # captures the graphs, which a stopwatch would disturb
    seconds, rates = time_with_matmul_reference(settings, runs, repeats, device)
    records = []
    for setting, times, run_parts, subject, peak in zip(settings, seconds, part_seconds, subjects, peaks, strict=True):
        decoder = flops_per_image(setting.network, setting.tokenizer)["decoder"]
        costs = sampling_costs(setting.sampling, setting.network)
        per_image = median(times) / setting.batch_size
        total = costs.flops_per_sampled_image + decoder
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
                "token_steps_per_image": costs.token_steps_per_image,
                "flops_per_image": total,
                "network_flops_per_image": costs.flops_per_sampled_image,
                "decoder_flops_per_image": decoder,
                "matmul_share": total / per_image / rates[setting.dtype],
                "matmul_flops_per_s": rates[setting.dtype],
                "peak_memory_bytes": peak,
                "state_bytes_per_image": state_bytes(setting.network, setting.dtype),
                "parameters": sum(p.numel() for p in subject.network.parameters()),
            }
        )
    return records


def measure_step(settings: list[Setting], device: torch.device, repeats: int) -> list[Record]:
    """Times the step of the last scale, starting from the state before it.

    Raises:
        InputError: if a network predicts single tokens, so that a scale takes many steps.
    """
    for setting in settings:
        if setting.network.prediction == "token":
            raise InputError(
                f"`bench step` times one scale, but mixer={setting.mixer} predicts single tokens: use another mixer"
            )
    subjects = [make_subject(setting, device) for setting in settings]
    begins = [subject.before_last_step() for subject in subjects]
    runs: list[Run] = [
        torch.no_grad()(partial(subject.network.step, *begin)) for subject, begin in zip(subjects, begins, strict=True)
    ]
    seconds = time_interleaved(runs, repeats, device)
    return [
        setting_record("step", setting, device)
        | {
            "tokens": setting.network.step_lengths[-1],
            "step_s_per_image": median(times) / setting.batch_size,
            "flops_per_image": scale_flops(setting.network)[-1],
            "state_bytes_per_image": mixer_state_bytes(state) // setting.batch_size,
        }
        for setting, times, (_, state) in zip(settings, seconds, begins, strict=True)
    ]


def measure_training(settings: list[Setting], device: torch.device, repeats: int) -> list[Record]:
    subjects = [make_subject(setting, device) for setting in settings]
    for setting, subject in zip(settings, subjects, strict=True):
        if setting.compile:
            for block in subject.network.blocks:
                configure_block(block, compile=True, checkpointing="none")  # type: ignore[arg-type]
    runs: list[Run] = [subject.training_step() for subject in subjects]
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


def profile_sampling(setting: Setting, device: torch.device) -> list[Record]:
    """Profiles one run after a warm-up run; returns the seconds and share of each part, excluding nested parts."""
    subject = make_subject(replace(setting, graphs=False), device)
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


def time_with_matmul_reference(
    settings: list[Setting], runs: list[Run], repeats: int, device: torch.device
) -> tuple[list[list[float]], dict[torch.dtype, float]]:
    """Times the runs interleaved with a large matrix product per precision; returns their seconds and its FLOP/s."""
    dtypes = list(dict.fromkeys(setting.dtype for setting in settings))
    products = [large_matmul(dtype, device) for dtype in dtypes]
    seconds = time_interleaved([*runs, *(product for product, _ in products)], repeats, device)
    times = zip(dtypes, products, seconds[len(runs) :], strict=True)
    return seconds[: len(runs)], {dtype: flops / median(t) for dtype, (_, flops), t in times}
