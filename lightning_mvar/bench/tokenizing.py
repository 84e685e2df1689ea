"""Speed of tokenizing images: image decoding, encoding, and both as a pipeline."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

import numpy as np
import torch

from lightning_mvar.bench.measure import time_interleaved
from lightning_mvar.data.images.examples import ImageSource, batch_loader, batched
from lightning_mvar.data.tokens.encode import TokenEncoder
from lightning_mvar.devices import Precision
from lightning_mvar.tokenizer.tokenizer import Tokenizer

BATCHES = 8  # per run


def measure_tokenizing(
    source: ImageSource,
    model: Tokenizer,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Measures images/s of reading and decoding, of the encoder, and of both as in `tokenize`, interleaved.

    All use the same random images, up to 8 batches of them. Images that cannot be decoded are skipped.
    """
    indices = np.random.default_rng(0).permutation(len(source))[: BATCHES * batch_size].tolist()
    batches, encoder = batched(indices, batch_size), TokenEncoder(model, device, precision)
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
        "precision": precision,
        "images": len(indices),
    } | dict(zip(names, rates, strict=True))
