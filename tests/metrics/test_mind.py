import numpy as np
import pytest
import torch

from lightning_mvar.metrics import mind as module
from lightning_mvar.metrics.mind import monge_distance, squared_wasserstein


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.RandomState(0)
    real, generated = rng.rand(60, 16), rng.rand(60, 16) ** 1.2
    return torch.from_numpy(real).float(), torch.from_numpy(generated).float()


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 4), (5, 7), (1, 9)])
def test_sorted_samples_are_the_optimal_transport(n: int, m: int) -> None:
    """Copies of each sample make both sets equally large, and then each sorted sample moves to its counterpart."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, count, generator=generator).double() for count in (n, m))
    expected = [
        np.mean((np.sort(np.repeat(x.numpy(), m)) - np.sort(np.repeat(y.numpy(), n))) ** 2)
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(squared_wasserstein(a, b), expected, rtol=1e-12)


def test_the_distance_agrees_with_torch_fidelity(sets: tuple) -> None:
    """Pinned: the value is that of the formula of `metric_mind.py` in torch-fidelity's repository, in float32."""
    assert monge_distance(*sets) == pytest.approx(0.402894124, rel=1e-6)


def test_a_shift_counts_by_its_length_and_blocks_do_not_change_the_result(
    sets: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, generated = sets
    shift = torch.full((16,), 0.25)
    # E (u . s)^2 = |s|^2 / f over random unit vectors u
    assert monge_distance(real, real + shift) == pytest.approx(3 * float(shift.square().sum()), rel=0.1)
    expected = monge_distance(real, generated[:50])
    monkeypatch.setattr(module, "BLOCK_PROJECTIONS", 7)
    monkeypatch.setattr(module, "BLOCK_ROWS", 9)
    assert monge_distance(real, generated[:50]) == pytest.approx(expected, rel=1e-12)
    assert monge_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-12)
