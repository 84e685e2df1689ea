"""Variants of a sweep over their seeds: means and deviations, and differences to a baseline with their significance."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_mvar.errors import InputError
from lightning_mvar.sweeps.results import LOSSES, SCALE_LOSS, SCORES, Axes, CellResult, Sweep

if TYPE_CHECKING:
    from types import ModuleType

DISTANCES = ("frechet_distance", "val/fid")  # of `evaluate`; failing that, of the training's own callback
LEVEL = 0.05  # of significance, and of what a confidence interval leaves out


@dataclass(frozen=True)
class Stat:
    """Mean, and standard deviation (n - 1) where there are at least two values, over n seeds."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class Variant:
    """The cells that differ in nothing but the seed.

    Args:
        name: of the cells without the seed.
        axes: value of each axis.
        cells: those that have finished, by seed.
        missing: seeds whose cell has not finished.
    """

    name: str
    axes: Axes
    cells: dict[int, CellResult]
    missing: list[int]

    def stat(self, measure: str) -> Stat | None:
        """Over the finished cells that have the measure; None if there are none."""
        values = [cell.measures[measure] for cell in self.cells.values() if measure in cell.measures]
        if not values:
            return None
        return Stat(statistics.fmean(values), deviation(values) if len(values) > 1 else None, len(values))

    def number(self, axis: str) -> float:
        return float(self.axes[axis])


@dataclass(frozen=True)
class Comparison:
    """A variant less the baseline, over the seeds that both have.

    Args:
        variant: name.
        measure: what is compared.
        seeds: in common.
        mean: of the differences; negative where the variant's value is lower.
        deviation: standard deviation (n - 1) of the differences.
        interval: 95 % confidence interval of the mean difference, by Student's t.
        p: of a paired two-sided t-test.
        significant: p below 0.05 after Holm's correction for all comparisons made together.
        reason: why there is no test; empty where there is one.
    """

    variant: str
    measure: str
    seeds: list[int]
    mean: float = math.nan
    deviation: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    p: float = math.nan
    significant: bool = False
    reason: str = ""


def deviation(values: list[float]) -> float:
    """Standard deviation (n - 1); nan if a value is no number, as after a training that diverged."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def variants_of(sweep: Sweep) -> list[Variant]:
    """In the sweep's order, those without a finished cell included."""
    found: list[Variant] = []
    for first in sweep.cells:
        if first.axes not in [variant.axes for variant in found]:
            alike = [cell for cell in sweep.cells if cell.axes == first.axes]
            cells = {cell.seed: cell for cell in alike if cell.finished}
            found.append(Variant(first.variant, first.axes, cells, [c.seed for c in alike if not c.finished]))
    return found


def distance_of(variants: list[Variant]) -> str | None:
    """The Frechet distance that cells have, if any."""
    return next((name for name in DISTANCES if any(variant.stat(name) for variant in variants)), None)


def choose_baseline(variants: list[Variant], name: str | None) -> Variant:
    """The variant of that name, or the first that has finished cells.

    Raises:
        InputError: if there is no such variant, or nothing of it has finished.
    """
    done = {variant.name: variant for variant in variants if variant.cells}
    if not done:
        raise InputError("no cell of the sweep has finished yet: start `lightning-mvar sweep` again")
    if name is None:
        return next(iter(done.values()))
    if name not in done:
        raise InputError(f"--baseline {name} is no variant with finished cells; there are {', '.join(done)}")
    return done[name]


def compare(variants: list[Variant], baseline: Variant) -> list[Comparison]:
    """Every other variant with the baseline, by validation loss and Frechet distance; see `Comparison`.

    Raises:
        InputError: if scipy is not installed.
    """
    stats = scipy_stats()
    distance = distance_of(variants)
    measured = ["val/loss"] if distance is None else ["val/loss", distance]
    others = [variant for variant in variants if variant.name != baseline.name and variant.cells]
    return holm([paired(stats, variant, baseline, measure) for measure in measured for variant in others])


def paired(stats: ModuleType, variant: Variant, baseline: Variant, measure: str) -> Comparison:
    ours, theirs = variant.cells, baseline.cells
    seeds = [s for s in ours if s in theirs and measure in ours[s].measures and measure in theirs[s].measures]
    if any(not comparable(ours[seed], theirs[seed], measure) for seed in seeds):
        about = "scored under other conditions" if measure in SCORES else "tokens of another tokenizer"
        return Comparison(variant.name, measure, seeds, reason=about)
    if len(seeds) < 2:
        return Comparison(variant.name, measure, seeds, reason="fewer than 2 seeds in common")
    differences = [ours[seed].measures[measure] - theirs[seed].measures[measure] for seed in seeds]
    found = Comparison(variant.name, measure, seeds, statistics.fmean(differences), deviation(differences))
    if not math.isfinite(found.deviation):
        return replace(found, reason="a value is no number")
    if not found.deviation:
        return replace(found, reason="the differences do not vary")
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(1 - LEVEL)
    return replace(found, interval=(float(low), float(high)), p=float(test.pvalue))


def comparable(one: CellResult, other: CellResult, measure: str) -> bool:
    """Whether two cells' values mean the same: losses are of one tokenizer's tokens, scores of one protocol."""
    if measure in LOSSES or measure.startswith(SCALE_LOSS):
        return one.tokenizer == other.tokenizer
    return measure not in SCORES or one.conditions == other.conditions


def holm(comparisons: list[Comparison]) -> list[Comparison]:
    """Mark what stays significant when all tests are taken together (Holm, 1979): the k-th smallest p of m, counted
    from 0, must be below LEVEL / (m - k), and so must all smaller ones."""
    tested = sorted((c for c in comparisons if not math.isnan(c.p)), key=lambda c: c.p)
    kept: list[Comparison] = []
    for rank, comparison in enumerate(tested):
        if comparison.p >= LEVEL / (len(tested) - rank):
            break
        kept.append(comparison)
    return [replace(c, significant=any(c is k for k in kept)) for c in comparisons]


def smallest_visible(seeds: int, comparisons: int) -> float:
    """The mean difference, in standard deviations of the differences, from which on a paired t-test of so many seeds
    is significant, if the level is shared evenly among the comparisons."""
    return float(scipy_stats().t.ppf(1 - LEVEL / comparisons / 2, seeds - 1)) / math.sqrt(seeds)


def scipy_stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise InputError("a report needs scipy: pip install 'lightning-mvar[report]'") from error
    return stats
