from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_two_ranks

from lightning_mvar.errors import InputError
from lightning_mvar.metrics import precision_recall as module
from lightning_mvar.metrics.precision_recall import (
    FeatureBank,
    precision_recall,
    precision_recall_without,
    squared_distances,
)

COUNTS = [(7, 3), (0, 4), (5, None), (None, 0), (None, None)]  # features on ranks 0 and 1; None for no update at all


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 6, generator=generator), torch.randn(270, 6, generator=generator) * 0.8 + 0.3


def scores_by_trees(real: torch.Tensor, generated: torch.Tensor, neighbors: int) -> dict[str, float]:
    """Returns the scores by k-d trees in float64; without an argument, kneighbors excludes each point itself."""
    from sklearn.neighbors import NearestNeighbors  # here, because the processes below import this file too

    def radii(centres: np.ndarray, k: int) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(centres).kneighbors()[0][:, -1:]

    x, y = real.double().numpy(), generated.double().numpy()
    distances = np.linalg.norm(x[:, None] - y, axis=2)
    inside = distances <= radii(x, 5)
    return {
        "precision": (distances <= radii(x, neighbors)).any(axis=0).mean(),
        "recall": (distances <= radii(y, neighbors).T).any(axis=1).mean(),
        "density": inside.sum() / 5 / len(y),
        "coverage": inside.any(axis=1).mean(),
    }


@pytest.mark.parametrize("neighbors", [1, 3, 10])
def test_scores_agree_with_nearest_neighbors(sets: tuple, neighbors: int) -> None:
    scores = precision_recall(*sets, neighbors)
    assert scores == pytest.approx(scores_by_trees(*sets, neighbors), rel=1e-12)
    assert 0.1 < scores["recall"] < scores["precision"]
    assert 0.1 < scores["coverage"] < 1 < scores["density"]


def test_scores_agree_with_prdc(sets: tuple) -> None:
    prdc = pytest.importorskip("prdc")
    scores = precision_recall(*sets, 5)
    expected = prdc.compute_prdc(*(features.double().numpy() for features in sets), nearest_k=5)
    assert scores == pytest.approx(expected, rel=1e-12)


def test_scores_without_a_group_are_those_of_the_other_features(sets: tuple) -> None:
    real, generated = sets[0], sets[1][:45]  # a group has two or three features
    groups = torch.arange(45) % 20
    for group, scores in enumerate(precision_recall_without(real, generated, groups, range(20), 3)):
        assert scores == precision_recall(real, generated[groups != group]), group


def test_near_neighbors_far_from_the_origin_keep_their_distances(sets: tuple) -> None:
    real, generated = (1000 + features / 50 for features in sets)
    assert precision_recall(real, generated) == pytest.approx(scores_by_trees(real, generated, 3), rel=1e-12)


def test_identical_sets_cover_each_other(sets: tuple) -> None:
    real, _ = sets
    scores = precision_recall(real, real.flip(0))
    assert (scores["precision"], scores["recall"], scores["coverage"]) == (1, 1, 1)
    assert scores["density"] == pytest.approx(6 / 5)  # each ball also contains its center


def test_distant_sets_do_not_overlap(sets: tuple) -> None:
    real, generated = sets
    assert set(precision_recall(real, generated + 100).values()) == {0}


def test_a_collapsed_generator_is_precise_and_dense_but_covers_and_recalls_little(sets: tuple) -> None:
    real, _ = sets
    scores = precision_recall(real, real[5].repeat(40, 1))
    assert (scores["precision"], scores["recall"]) == (1, 1 / 300)
    assert scores["coverage"] == pytest.approx(scores["density"] * 5 / 300)  # the real balls around one feature
    assert scores["coverage"] < 0.1


def test_balls_are_closed() -> None:
    real, generated = torch.arange(7.0)[:, None], torch.tensor([[7.0], [7.5], [-1.0], [-2.5], [-9.0], [-9.1]])
    scores = precision_recall(real, generated, neighbors=1)
    assert (scores["precision"], scores["recall"]) == (2 / 6, 1 / 7)


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


@pytest.mark.parametrize(("real", "generated", "neighbors"), [(5, 9, 3), (9, 5, 3), (9, 9, 9), (9, 9, 0)])
def test_too_few_features_are_refused(real: int, generated: int, neighbors: int) -> None:
    with pytest.raises(InputError, match=f"{neighbors} neighbors, {real} real and {generated} generated"):
        precision_recall(torch.zeros(real, 2), torch.zeros(generated, 2), neighbors)


def test_the_bank_keeps_all_features_in_order_until_it_is_reset(sets: tuple) -> None:
    real, _ = sets
    bank = FeatureBank(6)
    for indices in torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).split(37):
        bank.update(real[indices].double().requires_grad_(), indices)
    assert torch.equal(bank.compute(), real)
    assert not bank.compute().requires_grad
    bank.reset()
    bank.update(real[:2], torch.tensor([7, 3]))
    assert torch.equal(bank.compute(), real[:2].flip(0))


def features_of(rank: int, count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features of a rank and their indices: each second image of the set."""
    return torch.arange(6 * (count or 0)).view(-1, 6) + 100.0 * rank, 2 * torch.arange(count or 0) + rank


def gather_on_rank(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=2, rank=rank)
    bank, gathered = FeatureBank(6), []
    for counts in COUNTS:
        if (count := counts[rank]) is not None:
            bank.update(*features_of(rank, count))
        gathered.append(bank.compute())
        bank.reset()
    torch.save(gathered, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_gather_any_numbers_of_features(tmp_path: Path) -> None:
    assert run_two_ranks(gather_on_rank, tmp_path) == [0, 0]
    for rank in range(2):
        for gathered, counts in zip(torch.load(tmp_path / f"{rank}.pt"), COUNTS, strict=True):
            features, indices = (torch.cat(parts) for parts in zip(*map(features_of, (0, 1), counts), strict=True))
            assert torch.equal(gathered, features[indices.argsort()])
            assert gathered.shape[1] == 6
