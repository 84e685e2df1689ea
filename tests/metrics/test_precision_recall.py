from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_two_ranks

from lightning_mvar.errors import InputError
from lightning_mvar.metrics import precision_recall as module
from lightning_mvar.metrics.precision_recall import FeatureBank, precision_recall, squared_distances

COUNTS = [(7, 3), (0, 4), (5, None), (None, 0), (None, None)]  # features on ranks 0 and 1; None for no update at all


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 6, generator=generator), torch.randn(270, 6, generator=generator) * 0.8 + 0.3


def coverage_by_trees(centres: torch.Tensor, points: torch.Tensor, neighbours: int) -> float:
    """Returns the coverage by k-d trees in float64; without an argument, kneighbors excludes each point itself."""
    from sklearn.neighbors import NearestNeighbors  # here, because the processes below import this file too

    tree = NearestNeighbors(n_neighbors=neighbours, algorithm="kd_tree").fit(centres.double().numpy())
    radii = tree.kneighbors()[0][:, -1]
    distances = [np.linalg.norm(centres.double().numpy() - point, axis=1) for point in points.double().numpy()]
    return float(np.mean([(distance <= radii).any() for distance in distances]))


@pytest.mark.parametrize("neighbours", [1, 3, 10])
def test_precision_and_recall_agree_with_nearest_neighbours(sets: tuple, neighbours: int) -> None:
    real, generated = sets
    precision, recall = precision_recall(real, generated, neighbours)
    assert precision == coverage_by_trees(real, generated, neighbours)
    assert recall == coverage_by_trees(generated, real, neighbours)
    assert 0.1 < recall < precision


def test_near_neighbours_far_from_the_origin_keep_their_distances(sets: tuple) -> None:
    real, generated = (1000 + features / 50 for features in sets)
    assert precision_recall(real, generated) == (
        coverage_by_trees(real, generated, 3),
        coverage_by_trees(generated, real, 3),
    )


def test_identical_sets_cover_each_other(sets: tuple) -> None:
    real, _ = sets
    assert precision_recall(real, real.flip(0)) == (1, 1)


def test_distant_sets_do_not_overlap(sets: tuple) -> None:
    real, generated = sets
    assert precision_recall(real, generated + 100) == (0, 0)


def test_a_collapsed_generator_is_precise_and_recalls_only_its_copies(sets: tuple) -> None:
    real, _ = sets
    assert precision_recall(real, real[5].repeat(40, 1)) == (1, 1 / 300)


def test_balls_are_closed() -> None:
    real, generated = torch.arange(4.0)[:, None], torch.tensor([[4.0], [4.5], [-1.0], [-2.5]])
    assert precision_recall(real, generated, neighbours=1) == (0.5, 0.25)


def test_blocks_do_not_change_the_result(sets: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = sets
    expected = precision_recall(real, generated)

    def checked_distances(rows: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        assert len(rows) <= 7
        return squared_distances(rows, *others)

    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    monkeypatch.setattr(module, "squared_distances", checked_distances)
    assert precision_recall(real, generated) == expected


def test_distances_agree_with_summed_differences_and_are_0_between_equals() -> None:
    features = torch.randn(50, 2048, generator=torch.Generator().manual_seed(0)).double()
    features[20:30] = features[:10]
    features[40] = features[5] * (1 + 1e-5)
    distances = squared_distances(features, features, features.square().sum(dim=1))
    expected = (features[:, None] - features).square().sum(dim=-1)
    torch.testing.assert_close(distances, expected, rtol=1e-3, atol=0)
    assert (distances[expected == 0] == 0).all()
    assert (distances == 0).sum() == 50 + 20


@pytest.mark.parametrize(("real", "generated", "neighbours"), [(3, 9, 3), (9, 3, 3), (9, 9, 0)])
def test_too_few_features_are_refused(real: int, generated: int, neighbours: int) -> None:
    with pytest.raises(InputError, match=f"{neighbours} neighbours, {real} real and {generated} generated"):
        precision_recall(torch.zeros(real, 2), torch.zeros(generated, 2), neighbours)


def test_the_bank_keeps_all_features_until_it_is_reset(sets: tuple) -> None:
    real, _ = sets
    bank = FeatureBank(6)
    for batch in real.double().requires_grad_().split(37):
        bank.update(batch)
    assert torch.equal(bank.compute(), real)
    assert not bank.compute().requires_grad
    bank.reset()
    bank.update(real[:2])
    assert torch.equal(bank.compute(), real[:2])


def features_of(rank: int, count: int | None) -> torch.Tensor:
    return torch.arange(6 * (count or 0)).view(-1, 6) + 100.0 * rank


def gather_on_rank(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=2, rank=rank)
    bank, gathered = FeatureBank(6), []
    for counts in COUNTS:
        if (count := counts[rank]) is not None:
            bank.update(features_of(rank, count))
        gathered.append(bank.compute())
        bank.reset()
    torch.save(gathered, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_gather_any_numbers_of_features(tmp_path: Path) -> None:
    assert run_two_ranks(gather_on_rank, tmp_path) == [0, 0]
    expected = [torch.cat([features_of(rank, count) for rank, count in enumerate(counts)]) for counts in COUNTS]
    for rank in range(2):
        for gathered, features in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert torch.equal(gathered, features)
            assert gathered.shape[1] == 6
