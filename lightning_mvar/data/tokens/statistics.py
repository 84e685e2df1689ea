"""What the tokens of a folder of shards are like: how many codes each scale uses, how many samples each class has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.data.tokens.shards import Manifest, Pack, Shard, read_shard
from lightning_mvar.errors import InputError


class TokenStatistics:
    """Accumulates the packs of a folder of shards.

    Args:
        manifest: of the folder.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.schedule, self.vocab_size = manifest.schedule, manifest.vocab_size
        self.codes = np.zeros((self.schedule.num_scales, self.vocab_size), np.int64)  # how often each scale has each
        self.classes = np.zeros(len(manifest.class_names), np.int64)

    def update(self, pack: Pack) -> None:
        """Count a pack, whose tokens and labels are in range."""
        spans = zip(self.schedule.offsets, self.schedule.lengths, strict=True)
        for counts, (begin, length) in zip(self.codes, spans, strict=True):
            counts += np.bincount(pack.tokens[:, begin : begin + length].ravel(), minlength=self.vocab_size)
        self.classes += np.bincount(pack.labels, minlength=len(self.classes))

    def per_scale(self) -> list[dict[str, Any]]:
        """Of each scale: its name, tokens counted, share of the codes in use, and perplexity, exp(entropy)."""
        return [
            {
                "scale": name,
                "tokens": int(counts.sum()),
                "codebook_usage": float((counts > 0).mean()),
                "codebook_perplexity": perplexity(counts),
            }
            for name, counts in zip(self.schedule.names, self.codes, strict=True)
        ]


def perplexity(counts: NDArray[np.int64]) -> float:
    """exp(entropy) of how often things occur: how many equally frequent ones would be as hard to guess. 0 for none."""
    if not counts.any():
        return 0.0
    shares = counts[counts > 0] / counts.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def count_shard(statistics: TokenStatistics, folder: Path, shard: Shard) -> None:
    """Count all packs of one shard.

    Raises:
        InputError: if it is damaged, or has what the manifest does not allow.
    """
    path, samples = shard.path_in(folder), 0
    for pack in read_shard(path):
        fits = pack.tokens.shape == (len(pack.labels), statistics.schedule.num_tokens)
        for values, end in ((pack.tokens, statistics.vocab_size), (pack.labels, len(statistics.classes))):
            fits = fits and bool(((values >= 0) & (values < end)).all())
        if not fits:
            break
        statistics.update(pack)
        samples += len(pack.labels)
    if samples != shard.samples:
        raise InputError(f"{path} does not fit its manifest; `lightning-mvar shards verify {folder}` says where")


def spread_samples(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` numbers below `count`, or all where there are fewer: one drawn from each of as many equal stretches."""
    edges = np.linspace(0, count, min(wanted, count) + 1).astype(np.int64)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:]).tolist()
