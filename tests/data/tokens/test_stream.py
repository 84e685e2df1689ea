import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_tokens, write_token_shards
from processes import CONTEXT
from torch.utils.data import DataLoader

from lightning_mvar.data.images.examples import Example, ImageBatch
from lightning_mvar.data.images.loader import ImageLoader, ShuffledImages
from lightning_mvar.data.resumable import worker_options
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.stream import TokenBatch, TokenLoader, TokenStream
from lightning_mvar.errors import InputError

SIZES = [20, 20, 20, 7]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_token_shards(tmp_path, "abc", SIZES)
    return tmp_path


def make_loader(
    folder: Path, batch_size: int = 8, seed: int | None = 0, rank: int = 0, world_size: int = 1, workers: int = 0
) -> TokenLoader:
    shards = LocalShards(folder)
    stream = TokenStream(shards, shards.manifest(), batch_size, seed, 30, rank, world_size)
    return TokenLoader(stream, workers, pin_memory=False)


def rows(batches: list[TokenBatch]) -> list[tuple[int, ...]]:
    """Returns each valid sample as a tuple of its label and tokens."""
    return [
        (int(label), *row.tolist())
        for batch in batches
        for row, label, valid in zip(batch.tokens, batch.labels, batch.valid, strict=True)
        if valid
    ]


def all_rows() -> set[tuple[int, ...]]:
    expected, begin = set(), 0
    for index, size in enumerate(SIZES):
        tokens = random_tokens(size, seed=index)
        for i, row in enumerate(tokens):
            row[0] = (begin + i) % 48
            expected.add(((begin + i) % 10, *row.tolist()))
        begin += size
    return expected


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


def test_order_depends_only_on_seed_and_epoch(folder: Path) -> None:
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
    single = list(make_loader(folder, 16, seed))
    ranks = [list(make_loader(folder, 16 // world_size, seed, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(single)}
    for i, batch in enumerate(single):
        parts = [batches[i] for batches in ranks]
        assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
        assert torch.equal(torch.cat([p.valid for p in parts]), batch.valid)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_restored_loader_resumes_where_the_other_stopped(folder: Path, stop: int, workers: int) -> None:
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


def test_fewer_samples_than_a_global_batch_are_rejected(folder: Path) -> None:
    with pytest.raises(InputError, match=r"67 samples, fewer than one global batch of 80: lower --data\.batch_size"):
        make_loader(folder, 40, world_size=2)


def test_a_resumed_epoch_counts_from_its_start_batch(folder: Path) -> None:
    """A run that ended in the middle of an epoch and is extended counts its batches from 0 again."""
    loader, trained = make_loader(folder), 0
    loader.batches_trained = lambda: trained
    loader.load_state_dict({"epoch": 0, "samples": 24})
    batches = iter(loader)
    for trained in range(3):
        next(batches)
        assert loader.state_dict() == {"epoch": 0, "samples": 24 + 8 * trained}


class IndexImages:
    """Image source whose images hold their index and one random number."""

    class_names, shape, identity = ("0",), (1, 1), "numbers"

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> Example:
        return Example(torch.tensor([float(index), 0.5]).view(2, 1, 1), 0, str(index))

    def random_crop(self, index: int, generator: torch.Generator) -> Example:
        drawn = float(torch.rand((), generator=generator))
        return Example(torch.tensor([float(index), drawn]).view(2, 1, 1), 0, str(index))


def image_loader(batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0, seed: int = 0) -> ImageLoader:
    source = ShuffledImages(IndexImages(), batch_size, seed, "random", rank, world_size)
    return ImageLoader(source, workers, pin_memory=False)


def image_rows(batches: list[ImageBatch]) -> list[list[float]]:
    return torch.cat([batch.images for batch in batches]).flatten(1).tolist()


def test_every_image_comes_once_per_epoch_in_a_new_order() -> None:
    loader = image_loader(5)
    first, second = image_rows(list(loader)), image_rows(list(loader))
    assert len(first) == 20
    assert len({number for number, _ in first}) == 20
    assert [number for number, _ in first] != [number for number, _ in second]
    first_crops = dict(first)
    assert all(first_crops[number] != crop for number, crop in second if number in first_crops)
    assert image_rows(list(image_loader(5, seed=1))) != first


def test_images_are_independent_of_workers_ranks_and_the_global_generator() -> None:
    expected = image_rows(list(image_loader(4)))
    torch.manual_seed(123)
    assert image_rows(list(image_loader(4, workers=2))) == expected
    ranks = [list(image_loader(2, rank, 2)) for rank in range(2)]
    assert image_rows([part for parts in zip(*ranks, strict=True) for part in parts]) == expected


def test_images_resume_where_they_stopped() -> None:
    expected = image_loader(4)
    first, second = image_rows(list(expected)), image_rows(list(expected))
    stopped = image_loader(4)
    batches = iter(stopped)
    head = [next(batches) for _ in range(2)]
    resumed = image_loader(2)  # a smaller batch: the position is counted in images
    resumed.load_state_dict(stopped.state_dict())
    assert image_rows(head + list(resumed)) == first
    assert image_rows(list(resumed)) == second


def test_fewer_images_than_a_global_batch_are_rejected() -> None:
    with pytest.raises(InputError, match=r"21 training images, fewer than one global batch of 22: lower --data\.batch"):
        image_loader(11, world_size=2)


def run_loader_and_signal_its_worker() -> None:
    loader = DataLoader(list(range(9)), None, collate_fn=lambda row: row, **worker_options(1))  # lambda: needs fork
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert list(batches) == list(range(1, 9))
    batches = iter(loader)
    next(batches)
    sys.held = batches  # keeps the worker alive until exit, as the traceback of an exception would


def test_a_worker_is_forked_ignores_foreign_signals_and_exits_with_its_process() -> None:
    process = CONTEXT.Process(target=run_loader_and_signal_its_worker)
    process.start()
    process.join(60)
    exit_code = process.exitcode
    process.kill()
    assert exit_code == 0
