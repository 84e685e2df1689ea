import itertools
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_two_ranks
from torch import nn
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.inception_score import InceptionScore

COUNT, CLASSES = 203, 7


def random_logits() -> torch.Tensor:
    return torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    metric = InceptionScore(logits.shape[1], len(logits), splits)
    metric.update(logits, torch.arange(len(logits)))
    return metric.compute()


def loop_over_images(logits: torch.Tensor, splits: list[list[int]]) -> list[float]:
    scores = []
    for images in splits:
        probabilities = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits[images].tolist()]
        marginal = [sum(column) / len(images) for column in zip(*probabilities, strict=True)]
        divergences = [sum(p * math.log(p / m) for p, m in zip(row, marginal, strict=True)) for row in probabilities]
        scores.append(math.exp(sum(divergences) / len(images)))
    return scores


def test_the_score_agrees_with_a_loop_over_the_permuted_images() -> None:
    permutation = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    images = permutation.argsort().tolist()
    edges = [math.ceil(i * COUNT / 10) for i in range(11)]
    scores = loop_over_images(random_logits(), [images[a:b] for a, b in itertools.pairwise(edges)])
    mean = sum(scores) / 10
    deviation = math.sqrt(sum((value - mean) ** 2 for value in scores) / 10)
    assert score(random_logits()) == pytest.approx((mean, deviation), rel=1e-12)
    assert deviation > 0.01


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std")
def test_one_split_agrees_with_torchmetrics() -> None:
    metric = TorchmetricsInceptionScore(feature=nn.Identity(), splits=1)
    metric.update(random_logits())
    assert score(random_logits(), splits=1) == (pytest.approx(float(metric.compute()[0]), rel=1e-5), 0)


def test_uniform_predictions_score_1() -> None:
    assert score(torch.zeros(100, 5)) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("logits", [torch.eye(5).log(), torch.eye(5) * 1e4], ids=["infinite", "large"])
def test_balanced_certain_predictions_score_the_number_of_classes(logits: torch.Tensor) -> None:
    assert score(logits.repeat(20, 1), splits=1) == pytest.approx((5, 0), abs=1e-12)


def test_images_sorted_by_class_are_spread_over_the_splits() -> None:
    mean, deviation = score(torch.eye(10).log().repeat_interleave(200, dim=0))
    assert 9.5 < mean < 10
    assert deviation < 0.2


@pytest.mark.parametrize(("count", "splits"), [(100, 10), (203, 10), (7, 7)])
def test_splits_are_equal_and_depend_on_the_seed(count: int, splits: int) -> None:
    split, same_seed, other_seed = (InceptionScore(2, count, splits, seed).split for seed in (1, 1, 2))
    assert set(split.bincount().tolist()) <= {count // splits, -(-count // splits)}
    assert len(split.unique()) == splits
    assert torch.equal(split, same_seed)
    assert not torch.equal(split, other_seed)


def test_order_batch_size_and_the_global_generator_do_not_matter() -> None:
    expected, logits = score(random_logits()), random_logits()
    torch.manual_seed(5)
    metric = InceptionScore(CLASSES, COUNT)
    for rows in torch.randperm(COUNT).split(17):
        metric.update(logits[rows], rows)
    assert metric.compute() == pytest.approx(expected, rel=1e-12)
    metric.reset()
    metric.update(logits, torch.arange(COUNT))
    assert metric.compute() == expected


def score_on_rank(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=2, rank=rank)
    torch.manual_seed(rank)
    metric = InceptionScore(CLASSES, COUNT)
    for rows in torch.arange(COUNT).split(50)[rank::2]:
        metric.update(random_logits()[rows], rows)
    torch.save(metric.compute(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    assert run_two_ranks(score_on_rank, tmp_path) == [0, 0]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(score(random_logits()), rel=1e-12)


@pytest.mark.parametrize("splits", [0, 10])
def test_empty_splits_are_refused(splits: int) -> None:
    with pytest.raises(InputError, match=f"needs 1 <= splits <= images, got {splits} splits and 9 images"):
        InceptionScore(3, num_samples=9, splits=splits)
