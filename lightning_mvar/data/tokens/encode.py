"""Encodes images into tokens, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_mvar.data.images.examples import ImageBatch
from lightning_mvar.devices import DTYPES, Precision, set_tf32
from lightning_mvar.tokenizer.tokenizer import Tokenizer


class EncodedBatch(NamedTuple):
    """The tokens of one batch of images."""

    tokens: NDArray[np.uint16]  # (n, l)
    labels: NDArray[np.int64]  # (n,)
    keys: list[str]
    errors: list[tuple[str, str]]  # key and error message of each unreadable image


class TokenEncoder:
    """Encodes batches of images into tokens on one device.

    Args:
        model: the tokenizer; it is moved to the device and its encoder is cast.
        device: device to encode on.
        precision: precision of the encoder; also enables or disables TF32 in this process, see `set_tf32`.
    """

    def __init__(self, model: Tokenizer, device: torch.device, precision: Precision) -> None:
        self.model, self.device = model.to(device).lower_encoder(DTYPES[precision]), device
        set_tf32(precision == "tf32")

    @torch.inference_mode()
    def __call__(self, batches: Iterable[ImageBatch]) -> Iterator[EncodedBatch]:
        for batch in batches:
            tokens = np.empty((0, self.model.config.schedule.num_tokens), np.uint16)
            if len(batch.images):
                features = self.model.features(batch.images.to(self.device))
                tokens = self.model.quantizer.encode(features.float()).cpu().numpy().astype(np.uint16)
            yield EncodedBatch(
                tokens, batch.labels.numpy(), batch.keys, [*zip(batch.failed_keys, batch.errors, strict=True)]
            )
