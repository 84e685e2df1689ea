import numpy as np
import pytest
import torch

from lightning_mvar.metrics.vendi import VendiScore


def vendi_score(features: torch.Tensor, batch: int = 4) -> float:
    score = VendiScore(features.shape[1])
    for rows in features.split(batch):
        score.update(rows)
    return score.compute()


@pytest.mark.parametrize("count", [5, 40])
def test_the_score_is_the_entropy_of_the_similarity_matrix(count: int) -> None:
    features = torch.rand(count, 12, generator=torch.Generator().manual_seed(0)) - 0.3
    x = features.double().numpy()
    similarities = (x @ x.T) / np.outer(*[np.linalg.norm(x, axis=1)] * 2)
    values = np.linalg.eigvalsh(similarities / count)
    values = values[values > 1e-14]
    assert vendi_score(features) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)


def test_the_score_counts_different_images() -> None:
    different = torch.eye(6)[:3] * torch.tensor([[1.0], [2.0], [9.0]])
    assert vendi_score(different.repeat(4, 1)) == pytest.approx(3)
    assert vendi_score(different[:1].repeat(4, 1)) == pytest.approx(1)
