"""Power-function profiles and the reconstruction of one from others, compared with sums over a dense grid."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_mvar.checkpoints.power_ema import (
    MAX_SIGMA_REL,
    Profile,
    check_sigma_rel,
    exponent_of,
    inner_product,
    power_decay,
    reconstruct,
)
from lightning_mvar.errors import InputError

STEPS, CELLS = 100, 200_000
TIMES = (np.arange(CELLS) + 0.5) * STEPS / CELLS
CELL = STEPS / CELLS


def values(profile: Profile) -> np.ndarray:
    """Returns the profile at each time of the grid."""
    exponent = exponent_of(profile.sigma_rel)
    shares = (exponent + 1) * (TIMES / profile.step) ** exponent / profile.step
    return np.where(profile.step > TIMES, shares, 0)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, MAX_SIGMA_REL])
def test_the_exponent_gives_the_width(sigma_rel: float) -> None:
    shares = values(Profile(STEPS, sigma_rel)) * CELL
    mean = (TIMES * shares).sum()
    assert shares.sum() == pytest.approx(1, rel=1e-4)
    assert (((TIMES - mean) ** 2 * shares).sum() ** 0.5) / STEPS == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_decays_give_each_step_its_share_of_the_profile(sigma_rel: float) -> None:
    shares = np.zeros(STEPS)
    for step in range(1, STEPS + 1):
        decay = power_decay(sigma_rel, step)
        shares *= decay
        shares[step - 1] += 1 - decay
    expected = values(Profile(STEPS, sigma_rel)).reshape(STEPS, -1).sum(axis=1) * CELL
    np.testing.assert_allclose(shares, expected, atol=1e-6)


def test_the_coefficients_are_those_of_least_squares_on_a_dense_grid() -> None:
    snapshots = [Profile(step, sigma_rel) for step in (25, 50, 75, 100) for sigma_rel in (0.05, 0.10)]
    for a, b in ((snapshots[1], snapshots[4]), (snapshots[4], snapshots[1]), (snapshots[2], snapshots[3])):
        assert inner_product(a, b) == pytest.approx((values(a) * values(b)).sum() * CELL, rel=1e-4)
    grid = np.stack([values(snapshot) for snapshot in snapshots], axis=1)
    for sigma_rel in (0.03, 0.08, 0.2):
        wanted = values(Profile(100, sigma_rel))
        # Coefficients that sum to 1: the last one is 1 minus the others.
        others = np.linalg.lstsq(grid[:, :-1] - grid[:, -1:], wanted - grid[:, -1])[0]
        expected = np.append(others, 1 - others.sum())
        coefficients, error = reconstruct(snapshots, Profile(100, sigma_rel))
        np.testing.assert_allclose(coefficients, expected, atol=1e-3)
        assert sum(coefficients) == pytest.approx(1, abs=1e-9)
        residual = np.linalg.norm(grid @ expected - wanted) / np.linalg.norm(wanted)
        assert error == pytest.approx(residual, rel=1e-3)


def test_more_snapshots_come_closer_and_a_kept_average_is_itself() -> None:
    errors = []
    for count in (4, 8, 16, 32):
        steps = [STEPS * (i + 1) // count for i in range(count)]
        snapshots = [Profile(step, sigma_rel) for step in steps for sigma_rel in (0.05, 0.10)]
        errors.append(reconstruct(snapshots, Profile(STEPS, 0.15))[1])
        coefficients, error = reconstruct(snapshots, Profile(STEPS, 0.10))
        assert coefficients == pytest.approx([*[0.0] * (2 * count - 1), 1.0], abs=1e-4)
        assert error < 1e-3
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.003


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29])
def test_impossible_widths_are_refused(sigma_rel: float) -> None:
    with pytest.raises(InputError, match=f"--ema {sigma_rel:g} is not a relative width of 0.001 to 0.289"):
        check_sigma_rel(sigma_rel, "--ema")
