"""Token statistics of a folder of shards: codebook usage per scale, samples per class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.packs import Pack


class TokenStatistics:
    """Counts codes per scale and samples per class over the packs of a folder of shards.

    Args:
        manifest: manifest of the folder.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.schedule, self.vocab_size = manifest.schedule, manifest.vocab_size
        self.codes = np.zeros((self.schedule.num_scales, self.vocab_size), np.int64)  # (k, v)
        self.classes = np.zeros(len(manifest.class_names), np.int64)

    def update(self, pack: Pack) -> None:
        """Counts a pack."""
        spans = zip(self.schedule.offsets, self.schedule.lengths, strict=True)
        for counts, (begin, length) in zip(self.codes, spans, strict=True):
            counts += np.bincount(pack.tokens[:, begin : begin + length].ravel(), minlength=self.vocab_size)
        self.classes += np.bincount(pack.labels, minlength=len(self.classes))

    def per_scale(self) -> list[dict[str, Any]]:
        """Returns one record per scale: its name, number of tokens, codebook usage in [0, 1] and perplexity."""
        return [
            {
                "scale": name,
                "tokens": int(counts.sum()),
                "codebook_usage": float((counts > 0).mean()),
                "codebook_perplexity": float(perplexity(torch.from_numpy(counts))) if counts.any() else 0.0,
            }
            for name, counts in zip(self.schedule.names, self.codes, strict=True)
        ]


def perplexity(counts: Tensor) -> Tensor:
    """Returns exp(entropy) of code counts, (..., v) -> (...) float64: the effective number of codes; 1 without any."""
    shares = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(dim=-1).exp()


def stratified_ids(num_samples: int, count: int, seed: int) -> list[int]:
    """Draws `count` ids below `num_samples`, one from each of `count` equal intervals; all ids if `count` is larger."""
    edges = np.linspace(0, num_samples, min(count, num_samples) + 1).astype(np.int64)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:]).tolist()
