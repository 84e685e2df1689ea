"""Batches of real images and own samples: halves, epochs of the own samples, ranks, workers and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_token_shards

from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.stream import PairedStream, TokenBatch, TokenLoader, TokenStream

REAL, OWN = [20, 20, 3], [13, 4]  # 10 batches of 4 real samples per epoch, 4 of own ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paired")
    for name, sizes in (("real", REAL), ("own", OWN)):
        write_token_shards(folder / name, "abc", sizes)
    return folder


def loader_of(folder: Path, rank: int = 0, world_size: int = 1, workers: int = 0) -> TokenLoader:
    streams = []
    for name in ("real", "own"):
        shards = LocalShards(folder / name)
        streams.append(TokenStream(shards, shards.manifest(), 4 // world_size, 0, 30, rank, world_size))
    return TokenLoader(PairedStream(*streams), workers, pin_memory=False)


def halves(batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    assert batch.own is not None
    return batch.ids[~batch.own], batch.ids[batch.own]


def test_each_batch_has_a_real_half_and_an_own_half_in_the_order_of_their_own_epochs(folder: Path) -> None:
    loader = loader_of(folder)
    batches = [*loader, *loader]
    assert len(loader) == 10
    assert len(batches) == 20
    seen = {}
    for k, (name, sizes) in enumerate((("real", REAL), ("own", OWN))):
        shards = LocalShards(folder / name)
        stream, expected = TokenStream(shards, shards.manifest(), 4, 0, 30, 0, 1), []
        while len(expected) < 20:
            expected += list(stream)
            stream.epoch += 1
        for batch, rows in zip(batches, expected[:20], strict=True):
            part = slice(0, 4) if k == 0 else slice(4, 8)
            assert batch.tokens[part].tolist() == rows.tokens.tolist()
            assert batch.labels[part].tolist() == rows.labels.tolist()
            assert batch.own[part].tolist() == [k == 1] * 4
        seen[name] = torch.cat([halves(batch)[k] for batch in batches])
        assert seen[name].max() < sum(sizes)
    assert torch.bincount(seen["own"]).max() == 5  # 20 batches are 5 epochs of 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 10, 17])
def test_a_restored_loader_continues_with_the_same_pairs(folder: Path, stop: int, workers: int) -> None:
    whole, stopped = loader_of(folder), loader_of(folder, workers=workers)
    expected = [batch.ids.tolist() for _ in range(2) for batch in whole]
    passes = iter([*[stopped] * 2])
    head: list[list[int]] = []
    for loader in passes:
        for batch in loader:
            head.append(batch.ids.tolist())
            if len(head) == stop:
                break
        if len(head) == stop:
            break
    resumed = loader_of(folder, workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    tail = [batch.ids.tolist() for batch in resumed]
    assert (head + tail) == expected[: len(head) + len(tail)]
    assert len(tail) == (10 if stop == 10 else 10 - stop % 10)


def test_ranks_together_see_the_pairs_of_one_process(folder: Path) -> None:
    ranks = [list(loader_of(folder, rank, 2)) for rank in range(2)]
    for i, batch in enumerate(loader_of(folder)):
        for k, half in enumerate(halves(batch)):
            assert torch.equal(torch.cat([halves(batches[i])[k] for batches in ranks]), half)
