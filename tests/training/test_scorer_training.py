"""Training of a scorer of drafts: what it learns, and how that is measured."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import torch
from conftest import CLASSES, SCHEDULE
from numpy.typing import NDArray

from lightning_mvar import Tokenizer
from lightning_mvar.data.tokens.manifest import Manifest, shard_name
from lightning_mvar.data.tokens.shards import write_shard
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.stream import PairedStream, TokenStream
from lightning_mvar.sampling.scorer import FORMAT, Scorer, ScorerConfig
from lightning_mvar.training.scorer import score_scales, separation, train

IMAGES = 96


def write_pyramids(folder: Path, tokens: NDArray[np.uint16], labels: NDArray[np.int64]) -> None:
    """Writes tokens (n, l) and labels (n,) as one shard."""
    folder.mkdir()
    keys = [f"{number}" for number in range(len(tokens))]
    shard = write_shard(folder / shard_name(0), tokens, labels, keys)
    manifest = Manifest([*SCHEDULE.side_lengths], 48, CLASSES, "0" * 16, "a test", len(tokens), len(tokens))
    manifest.shards = [shard]
    manifest.save(folder)


def stream_of(folder: Path, seed: int | None = 0, batch_size: int = 16) -> TokenStream:
    source = LocalShards(folder)
    return TokenStream(source, source.manifest(), batch_size, seed, block_size=1000, rank=0, world_size=1)


def write_both(folder: Path) -> None:
    """Real pyramids have equal tokens within each scale, drawn ones independent tokens of the same distribution."""
    rng = np.random.default_rng(0)
    labels = rng.integers(len(CLASSES), size=IMAGES)
    codes = rng.integers(8, size=(IMAGES, SCHEDULE.num_scales))
    write_pyramids(folder / "real", np.ascontiguousarray(codes[:, SCHEDULE.scale_ids.numpy()], np.uint16), labels)
    write_pyramids(folder / "own", rng.integers(8, size=(IMAGES, SCHEDULE.num_tokens)).astype(np.uint16), labels)


def new_scorer(tokenizer: Tokenizer) -> Scorer:
    torch.manual_seed(0)
    config = ScorerConfig(FORMAT.number, [*SCHEDULE.side_lengths], tokenizer.config.code_dim, 3, 8, "0" * 16, "a test")
    return Scorer(config)


def test_scores_are_those_of_each_scale(tokenizer: Tokenizer) -> None:
    scorer, rng = new_scorer(tokenizer).eval(), np.random.default_rng(0)
    tokens = rng.integers(48, size=(5, SCHEDULE.num_tokens)).astype(np.uint16)
    labels = rng.integers(3, size=5)
    scores = score_scales(scorer, tokenizer.quantizer, tokens, labels)
    f_hats = [*tokenizer.quantizer.f_hats(torch.from_numpy(tokens.astype(np.int64)))]
    for k, f_hat in enumerate(f_hats):
        torch.testing.assert_close(scores[:, k], scorer(f_hat, torch.from_numpy(labels), k))


def test_separation_counts_pairs_in_the_right_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_both(tmp_path)
    scorer = new_scorer(tokenizer).eval()
    streams = [stream_of(tmp_path / name, seed=None, batch_size=20) for name in ("real", "own")]
    rows = [np.concatenate([r.tokens[r.valid] for r in stream]) for stream in streams]
    labels = [np.concatenate([r.labels[r.valid] for r in stream]) for stream in streams]
    real, own = (score_scales(scorer, tokenizer.quantizer, *pair) for pair in zip(rows, labels, strict=True))
    shares = separation(scorer, tokenizer.quantizer, *streams)
    for k in range(SCHEDULE.num_scales):
        pairs = [*product(real[:, k].tolist(), own[:, k].tolist())]
        expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
        torch.testing.assert_close(float(shares[k]), expected)


def test_training_learns_which_tokens_go_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A scale of one token cannot be told apart, as both have the same distribution."""
    write_both(tmp_path)
    scorer, losses = new_scorer(tokenizer), list[float]()
    batches = PairedStream(stream_of(tmp_path / "real"), stream_of(tmp_path / "own", seed=1))
    train(scorer, tokenizer.quantizer, batches, 60, 3e-3, losses.append)
    assert len(losses) == 60
    assert not scorer.training
    shares = separation(scorer, tokenizer.quantizer, *(stream_of(tmp_path / name, None) for name in ("real", "own")))
    assert shares[-1] > 0.9
    assert 0.3 < shares[0] < 0.7
