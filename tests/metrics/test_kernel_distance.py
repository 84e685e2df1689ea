import numpy as np
import pytest
import torch

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.intervals import assign_groups
from lightning_mvar.metrics.kernel_distance import kernel_distance, kernel_replicates


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.RandomState(0)
    real, generated = rng.rand(90, 16), rng.rand(70, 16) ** 1.2
    return torch.from_numpy(real).float(), torch.from_numpy(generated).float()


def test_a_subset_of_everything_gives_the_mean_over_all_pairs(sets: tuple) -> None:
    real, generated = sets[0][:8], sets[1][:8]

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if a is not b or i != j]
        return sum((float(x.double() @ y.double()) / 16 + 1) ** 3 for x, y in pairs) / len(pairs)

    expected = mean(real, real) + mean(generated, generated) - 2 * mean(real, generated)
    assert kernel_distance(real, generated, subsets=2) == pytest.approx((expected, 0), rel=1e-9, abs=1e-12)


def test_the_distance_agrees_with_torch_fidelity(sets: tuple) -> None:
    """Pinned: torch-fidelity 0.4.0 imports torchvision, which has no build for this torch.

    The values are those of `kid_features_to_metric(generated, real, kid_subsets=20, kid_subset_size=50)` for float64
    features.
    """
    expected = 0.006101357626945525, 0.005185985555826238
    assert kernel_distance(*sets, subsets=20, subset_size=50) == pytest.approx(expected, rel=1e-9)


def test_the_expected_distance_of_a_set_to_itself_is_0_whatever_the_subsets(sets: tuple) -> None:
    real, _ = sets
    small, large = (kernel_distance(real[::2], real[1::2], subset_size=size)[0] for size in (10, 40))
    far = kernel_distance(real, real + 0.2)[0]
    assert max(abs(small), abs(large)) < far / 10


def test_a_single_feature_is_refused(sets: tuple) -> None:
    with pytest.raises(InputError, match="at least 2 features in each set, got 90 real and 1 generated"):
        kernel_distance(sets[0], sets[1][:1])


def test_kernel_distances_without_a_group_are_those_of_the_other_images() -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(70, 5, generator=generator), torch.randn(90, 5, generator=generator) + 0.3
    groups = assign_groups(90)
    for group, value in enumerate(kernel_replicates(real, generated, groups)):
        kept = generated[groups != group].double()
        kernels = [(a @ b.T / 5 + 1) ** 3 for a, b in ((kept, kept), (real.double(), real.double()))]
        within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernels)
        expected = within - 2 * ((kept @ real.double().T / 5 + 1) ** 3).mean()
        assert value == pytest.approx(float(expected), abs=1e-12)
