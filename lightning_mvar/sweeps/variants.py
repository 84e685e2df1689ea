"""Statistics of variants over seeds: means, deviations, and differences to a baseline with their significance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_mvar.errors import InputError, require_package
from lightning_mvar.sweeps.measures import DISTANCES, LOSSES, SCALE_LOSS, SCORES
from lightning_mvar.sweeps.results import Axes, CellResult, Sweep

if TYPE_CHECKING:
    from types import ModuleType

SIGNIFICANCE_LEVEL = 0.05  # of the tests; confidence intervals cover 1 - this


@dataclass(frozen=True)
class Stat:
    """Mean over n seeds, and its spread on two levels, training seeds and sampling seeds.

    Args:
        mean: mean over the seeds of each seed's value, which is the mean over its sampling seeds.
        deviation: standard deviation (n - 1) of the seeds' values; None for one seed.
        n: number of seeds.
        sampling_deviation: standard deviation (n - 1) between sampling seeds of the same cell, pooled over the cells;
            None without several sampling seeds.
    """

    mean: float
    deviation: float | None
    n: int
    sampling_deviation: float | None = None

    @property
    def standard_error(self) -> float | None:
        """Returns the standard error of the mean; sampling seeds are no independent runs, so they do not lower n."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.n)


@dataclass(frozen=True)
class Variant:
    """A set of cells that differ only in the seed.

    Args:
        name: name of its cells without the seed.
        axes: value on each axis.
        cells: finished cells, by seed.
        missing: seeds whose cell has not finished.
    """

    name: str
    axes: Axes
    cells: dict[int, CellResult]
    missing: list[int]

    def stat(self, measure: str) -> Stat | None:
        """Returns statistics over the finished cells that have the measure; None if no cell has it."""
        values = [cell.measures[measure] for cell in self.cells.values() if measure in cell.measures]
        if not values:
            return None
        spread = deviation(values) if len(values) > 1 else None
        return Stat(statistics.fmean(values), spread, len(values), self.sampling_deviation(measure))

    def sampling_deviation(self, measure: str) -> float | None:
        """Returns the standard deviation between sampling seeds of the same cell, pooled over the cells."""
        draws = [[scores[measure] for scores in c.draws.values() if measure in scores] for c in self.cells.values()]
        variances = [deviation(values) ** 2 for values in draws if len(values) > 1]
        return math.sqrt(statistics.fmean(variances)) if variances else None

    def number(self, axis: str) -> float:
        return float(self.axes[axis])


@dataclass(frozen=True)
class Comparison:
    """Differences of a variant minus the baseline, over the seeds that both have.

    Args:
        variant: name of the variant.
        measure: name of the compared measure.
        seeds: seeds in common.
        mean: mean of the differences; negative if the variant's value is lower.
        deviation: standard deviation (n - 1) of the differences.
        interval: 95 % confidence interval of the mean difference, by Student's t.
        p: p-value of a paired two-sided t-test.
        significant: p below 0.05 after Holm's correction over all comparisons.
        reason: why there is no test; empty if there is one.
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
    """Returns the standard deviation (n - 1); nan if a value is not finite, as after a diverged training run."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def variants_of(sweep: Sweep) -> list[Variant]:
    """Groups cells into variants, in the sweep's order, including variants without a finished cell."""
    variants: list[Variant] = []
    for first in sweep.cells:
        if first.axes not in [variant.axes for variant in variants]:
            group = [cell for cell in sweep.cells if cell.axes == first.axes]
            cells = {cell.seed: cell for cell in group if cell.finished}
            variants.append(Variant(first.variant, first.axes, cells, [c.seed for c in group if not c.finished]))
    return variants


def distance_of(variants: list[Variant]) -> str | None:
    """Returns the name of the Frechet distance that the cells have; None if they have none."""
    return next((name for name in DISTANCES if any(variant.stat(name) for variant in variants)), None)


def choose_baseline(variants: list[Variant], name: str | None) -> Variant:
    """Returns the variant of that name, or the first that has finished cells.

    Raises:
        InputError: if there is no such variant, or none of its cells has finished.
    """
    done = {variant.name: variant for variant in variants if variant.cells}
    if not done:
        raise InputError("no cell of the sweep has finished yet: start `lightning-mvar sweep` again")
    if name is None:
        return next(iter(done.values()))
    if name not in done:
        raise InputError(f"--baseline {name} is not a variant with finished cells; choose one of {', '.join(done)}")
    return done[name]


def compared_measures(variants: list[Variant], measures: Sequence[str] = ()) -> list[str]:
    """Returns those of the measures that any variant has; by default validation loss and Frechet distance."""
    distance = distance_of(variants)
    chosen = measures or ["val/loss", *([] if distance is None else [distance])]
    return [measure for measure in chosen if any(variant.stat(measure) for variant in variants)]


def compare(variants: list[Variant], baseline: Variant, measures: Sequence[str] = ()) -> list[Comparison]:
    """Compares every other variant with the baseline, by the measures of `compared_measures`; see `Comparison`.

    Raises:
        InputError: if scipy is not installed.
    """
    stats = scipy_stats()
    others = [variant for variant in variants if variant.name != baseline.name and variant.cells]
    pairs = [(variant, measure) for measure in compared_measures(variants, measures) for variant in others]
    return holm_correction([paired_comparison(stats, variant, baseline, measure) for variant, measure in pairs])


def paired_comparison(stats: ModuleType, variant: Variant, baseline: Variant, measure: str) -> Comparison:
    ours, theirs = variant.cells, baseline.cells
    seeds = [s for s in ours if s in theirs and measure in ours[s].measures and measure in theirs[s].measures]
    if any(not comparable(ours[seed], theirs[seed], measure) for seed in seeds):
        reason = "scored under other conditions" if measure in SCORES else "tokens of another tokenizer"
        return Comparison(variant.name, measure, seeds, reason=reason)
    if len(seeds) < 2:
        return Comparison(variant.name, measure, seeds, reason="fewer than 2 seeds in common")
    differences = [ours[seed].measures[measure] - theirs[seed].measures[measure] for seed in seeds]
    comparison = Comparison(variant.name, measure, seeds, statistics.fmean(differences), deviation(differences))
    if not math.isfinite(comparison.deviation):
        return replace(comparison, reason="a value is not finite")
    if not comparison.deviation:
        return replace(comparison, reason="the differences do not vary")
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(1 - SIGNIFICANCE_LEVEL)
    return replace(comparison, interval=(float(low), float(high)), p=float(test.pvalue))


def comparable(one: CellResult, other: CellResult, measure: str) -> bool:
    """Returns whether two cells' values are comparable: losses need the same tokenizer, scores the same conditions."""
    if measure in LOSSES or measure.startswith(SCALE_LOSS):
        return one.tokenizer == other.tokenizer
    return measure not in SCORES or one.conditions == other.conditions


def holm_correction(comparisons: list[Comparison]) -> list[Comparison]:
    """Marks the comparisons that are significant after Holm's correction (1979).

    The k-th smallest of m p-values, counted from 0, must be below SIGNIFICANCE_LEVEL / (m - k), as must all smaller
    ones.
    """
    tested = sorted((c for c in comparisons if not math.isnan(c.p)), key=lambda c: c.p)
    significant: list[Comparison] = []
    for rank, comparison in enumerate(tested):
        if comparison.p >= SIGNIFICANCE_LEVEL / (len(tested) - rank):
            break
        significant.append(comparison)
    return [replace(c, significant=any(c is s for s in significant)) for c in comparisons]


def smallest_significant_difference(seeds: int, comparisons: int) -> float:
    """Returns the smallest mean difference that a paired t-test over `seeds` seeds finds significant.

    In standard deviations of the differences, with the significance level split evenly among the comparisons.
    """
    return float(scipy_stats().t.ppf(1 - SIGNIFICANCE_LEVEL / comparisons / 2, seeds - 1)) / math.sqrt(seeds)


def scipy_stats() -> ModuleType:
    require_package("scipy", "report", "a report")
    from scipy import stats

    return stats
