"""How fast images become tokens: decoding, encoding, and one beside the other."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

import numpy as np
import torch

from lightning_mvar.bench.measure import alternate
from lightning_mvar.data.images.examples import ImageSource, batch_loader, batched
from lightning_mvar.data.tokens.encode import TokenEncoder
from lightning_mvar.devices import Precision
from lightning_mvar.tokenizer.tokenizer import Tokenizer

BATCHES = 8  # of each run


def measure_tokenizing(
    source: ImageSource,
    model: Tokenizer,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Images/s of reading and decoding alone, of the encoder alone, and of `tokenize`, measured in turns.

    Of the same images, up to 8 batches at random. What cannot be decoded is left out.
    """
    chosen = np.random.default_rng(0).permutation(len(source))[: BATCHES * batch_size].tolist()
    batches, encoder = batched(chosen, batch_size), TokenEncoder(model, device, precision)
    held = list(batch_loader(source, batches, num_workers))

    def decode() -> None:
        deque(batch_loader(source, batches, num_workers), maxlen=0)

    def encode() -> None:
        deque(encoder(held), maxlen=0)

    def both() -> None:
        deque(encoder(batch_loader(source, batches, num_workers)), maxlen=0)

    rates = [len(chosen) / median(times) for times in alternate([decode, encode, both], repeats, device)]
    names = ("decode_images_per_s", "encode_images_per_s", "pipeline_images_per_s")
    return {
        "what": "tokenize",
        "resolution": model.config.shape[0],
        "batch_size": batch_size,
        "num_workers": num_workers,
        "precision": precision,
        "images": len(chosen),
    } | dict(zip(names, rates, strict=True))
