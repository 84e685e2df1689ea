"""Speed of tokenizing images: image decoding, encoding, and both as a pipeline."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from lightning_mvar.bench.measure import time_interleaved
from lightning_mvar.bench.subjects import Setting, flops_per_image, make_subject, setting_record
from lightning_mvar.cli.tables import Record
from lightning_mvar.data.images.examples import ImageBatch, batch_loader, batched
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.data.tokens.encode import TokenEncoder

BATCHES = 8  # per run


def measure_tokenizing(images: str, setting: Setting, num_workers: int, device: torch.device, repeats: int) -> Record:
    """Measures images/s of reading and decoding, of the encoder, and of both as in `tokenize`, interleaved.

    All use the same random images, at most 8 batches. Images that cannot be decoded are skipped.

    Args:
        images: image source, as in `lightning-mvar tokenize`.
        setting: resolution, batch size and precision.
        num_workers: number of reader processes.
        device: device of the encoder.
        repeats: number of measured runs.
    """
    source = open_images(images, (setting.resolution, setting.resolution), "skip")
    model, batch_size = make_subject(setting.with_changes("precision=float32"), device).tokenizer, setting.batch_size
    indices = np.random.default_rng(0).permutation(len(source))[: BATCHES * batch_size].tolist()
    batches, encoder = batched(indices, batch_size), TokenEncoder(model, device, setting.precision)
    decoded = list(batch_loader(source, batches, num_workers))

    def decode() -> None:
        deque(batch_loader(source, batches, num_workers), maxlen=0)

    def encode() -> None:
        deque(encoder(decoded), maxlen=0)

    def pipeline() -> None:
        deque(encoder(batch_loader(source, batches, num_workers)), maxlen=0)

    rates = [len(indices) / median(times) for times in time_interleaved([decode, encode, pipeline], repeats, device)]
    names = ("decode_images_per_s", "encode_images_per_s", "pipeline_images_per_s")
    return {
        "what": "tokenize",
        "resolution": model.config.shape[0],
        "batch_size": batch_size,
        "num_workers": num_workers,
        "precision": setting.precision,
        "images": len(indices),
    } | dict(zip(names, rates, strict=True))


def measure_encoding(setting: Setting, device: torch.device, repeats: int) -> Record:
    """Measures images/s of the encoder on a batch of random images in host memory."""
    model = make_subject(replace(setting, precision="float32"), device).tokenizer
    encoder, b = TokenEncoder(model, device, setting.precision), setting.batch_size
    images = torch.rand(b, 3, *model.config.shape) * 2 - 1
    batch = ImageBatch(images, torch.zeros(b, dtype=torch.int64), [str(i) for i in range(b)], [], [])
    (seconds,) = time_interleaved([lambda: deque(encoder([batch]), maxlen=0)], repeats, device)
    return setting_record("tokenize", setting, device) | {
        "images_per_s": b / median(seconds),
        "flops_per_image": flops_per_image(setting.network, setting.tokenizer)["encoder"],
    }
