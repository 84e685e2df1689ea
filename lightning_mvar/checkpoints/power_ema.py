"""Power-function averages of weights, and averages of any width from snapshots of two (EDM2, arXiv 2312.02696).

| paper (section 3, appendix C) | here         | meaning                                                             |
|-------------------------------|--------------|---------------------------------------------------------------------|
| gamma                         | exponent     | the weights of step tau have a share proportional to tau^gamma      |
| sigma_rel                     | sigma_rel    | standard deviation of that profile, relative to the training time   |
| beta_gamma(t)                 | power_decay  | decay of the average in step t                                      |
| p_gamma,t                     | Profile      | shares of the weights of steps 1 to t                               |
| algorithm 3                   | reconstruct  | coefficients on snapshots that approximate the wanted profile       |
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from lightning_mvar.errors import InputError

MIN_SIGMA_REL, MAX_SIGMA_REL = 1e-3, 12**-0.5  # nearly the last weights only; the mean over all steps


class Profile(NamedTuple):
    """Shares of the weights of steps 1 to `step` in a power-function average of relative width `sigma_rel`."""

    step: int
    sigma_rel: float


def check_sigma_rel(sigma_rel: float, option: str) -> None:
    """Raises InputError that names the option unless a power function can have this width."""
    if not MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL:
        bounds = f"{MIN_SIGMA_REL:g} to {MAX_SIGMA_REL:.3f}"
        raise InputError(f"{option} {sigma_rel:g} is not a relative width of {bounds}; 0.05 to 0.15 is usual")


@cache
def exponent_of(sigma_rel: float) -> float:
    """Returns gamma >= 0 for a relative width: the root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def power_decay(sigma_rel: float, step: int) -> float:
    """Returns the decay of the average in a step, counted from 1; 0 in the first step."""
    return float((1 - 1 / step) ** (exponent_of(sigma_rel) + 1))


def reconstruct(snapshots: list[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Finds the linear combination of averages whose profile is closest to the wanted one, by least squares.

    Unlike in algorithm 3, the coefficients sum to 1. Weights change little compared with their norm, so a sum of 0.999
    could change them more than any difference between two averages.

    Returns:
        One coefficient per snapshot, and the norm of the residual relative to that of the wanted profile.
    """
    # Inner products in units of 1 / wanted.step, so that all equations have the same magnitude.
    overlaps = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots]) * wanted.step
    targets = np.array([inner_product(snapshot, wanted) for snapshot in snapshots]) * wanted.step
    norm = inner_product(wanted, wanted) * wanted.step
    ones = np.ones((len(snapshots), 1))
    system = np.block([[overlaps, ones], [ones.T, np.zeros((1, 1))]])  # the last unknown is the Lagrange multiplier
    # Equations of neighboring snapshots are nearly dependent; the minimum-norm solution amplifies rounding least.
    coefficients = np.linalg.lstsq(system, np.append(targets, 1.0), rcond=1e-12)[0][:-1]
    difference = coefficients @ overlaps @ coefficients - 2 * coefficients @ targets + norm
    return coefficients.tolist(), float((max(difference, 0.0) / norm) ** 0.5)


def inner_product(a: Profile, b: Profile) -> float:
    """Integrates the product of two profiles (gamma + 1) tau^gamma / t^(gamma + 1) over the steps tau."""
    if a.step > b.step:
        a, b = b, a
    first, second = exponent_of(a.sigma_rel), exponent_of(b.sigma_rel)
    shared = (a.step / b.step) ** second / b.step
    return (first + 1) * (second + 1) / (first + second + 1) * shared
