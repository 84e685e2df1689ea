from pathlib import Path

import pytest
import torch
from conftest import random_tokens, write_token_shards

from lightning_mvar.data.loader import TokenBatch, TokenLoader, TokenStream
from lightning_mvar.errors import InputError

SIZES = [20, 20, 20, 7]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_token_shards(tmp_path, "abc", SIZES)
    return tmp_path


def make_loader(
    folder: Path, batch_size: int = 8, seed: int | None = 0, rank: int = 0, world_size: int = 1, workers: int = 0
) -> TokenLoader:
    from lightning_mvar.data.shards import Manifest

    stream = TokenStream(folder, Manifest.load(folder), batch_size, seed, 30, rank, world_size)
    return TokenLoader(stream, workers, pin_memory=False)


def rows(batches: list[TokenBatch]) -> list[tuple[int, ...]]:
    """Every valid sample as a tuple of its label and tokens."""
    return [
        (int(label), *row.tolist())
        for batch in batches
        for row, label, valid in zip(batch.tokens, batch.labels, batch.valid, strict=True)
        if valid
    ]


def all_rows() -> set[tuple[int, ...]]:
    written, begin = set(), 0
    for index, size in enumerate(SIZES):
        tokens = random_tokens(size, seed=index)
        for i, row in enumerate(tokens):
            row[0] = (begin + i) % 48
            written.add(((begin + i) % 10, *row.tolist()))
        begin += size
    return written


def test_a_shuffled_epoch_has_every_sample_at_most_once_and_full_batches(folder: Path) -> None:
    loader = make_loader(folder)
    batches = list(loader)
    assert len(batches) == len(loader) == 67 // 8
    assert all(batch.tokens.shape == (8, 30) and batch.valid.all() for batch in batches)
    assert batches[0].tokens.dtype == torch.int64
    seen = rows(batches)
    assert len(set(seen)) == len(seen) == 64
    assert set(seen) <= all_rows()


def test_an_ordered_pass_has_every_sample_exactly_once(folder: Path) -> None:
    loader = make_loader(folder, seed=None)
    batches = list(loader)
    assert len(batches) == len(loader) == 9
    assert all(len(batch.labels) == 8 for batch in batches)
    seen = rows(batches)
    assert len(seen) == 67
    assert set(seen) == all_rows()
    assert rows(list(loader)) == seen


def test_order_depends_on_seed_and_epoch_alone(folder: Path) -> None:
    loader = make_loader(folder)
    first, second = rows(list(loader)), rows(list(loader))
    assert first != second
    assert rows(list(make_loader(folder))) == first
    assert rows(list(make_loader(folder, seed=1))) != first


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_change_the_batches(folder: Path, workers: int) -> None:
    expected, actual = list(make_loader(folder)), list(make_loader(folder, workers=workers))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_global_batches_of_one_process(folder: Path, seed: int | None, world_size: int) -> None:
    alone = list(make_loader(folder, 16, seed))
    ranks = [list(make_loader(folder, 16 // world_size, seed, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for i, batch in enumerate(alone):
        parts = [batches[i] for batches in ranks]
        assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
        assert torch.equal(torch.cat([p.valid for p in parts]), batch.valid)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_restored_position_goes_on_where_the_other_stopped(folder: Path, stop: int, workers: int) -> None:
    uninterrupted = make_loader(folder)
    expected = [rows(list(uninterrupted)) for _ in range(3)]
    interrupted = make_loader(folder, workers=workers)
    list(interrupted)
    second = iter(interrupted)
    head = [next(second) for _ in range(stop)]
    resumed = make_loader(folder, workers=workers)
    resumed.load_state_dict(interrupted.state_dict())
    if stop < len(resumed):
        assert rows(head + list(resumed)) == expected[1]
    assert rows(list(resumed)) == expected[2]


def test_fewer_samples_than_a_global_batch_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"67 samples, fewer than one global batch of 80: lower --data\.batch_size"):
        make_loader(folder, 40, world_size=2)
