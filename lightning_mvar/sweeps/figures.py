"""Figures of a sweep: the mean of each variant's seeds, and every seed as a point or a thin line beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_mvar.errors import InputError
from lightning_mvar.sweeps.results import SCALE_LOSS, Axes, Sweep, is_number
from lightning_mvar.sweeps.variants import Variant, comparable, distance_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot
    from matplotlib.figure import Figure

Look = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow that fades on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<>hp*"
DASHES = ("-", "--", ":")
WIDTH, HEIGHT = 10.0, 4.4  # inches; 1000 pixels at DPI
DPI = 100
BESIDE = 8  # names that have room beside the plots; more stand below, in columns
COLUMNS, LEGEND_ROW = 3, 0.2  # inches
WIDE = 5  # largest over smallest from which on an axis is logarithmic
# A mean among points of seeds, which show through it.
SEED: Look = {"marker": ".", "markersize": 5, "linestyle": "none", "alpha": 0.6}
OPEN: Look = {"markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1.5}
ALONE: Look = OPEN | {"linestyle": "none"}

LOSS_LABEL = "validation loss (nats a token)"
DISTANCE_LABELS = {"frechet_distance": "Frechet distance", "val/fid": "Frechet distance in training"}
COST_LABELS = {"flops_per_sampled_image": "FLOPs per sampled image", "parameters": "parameters"}


def all_figures(sweep: Sweep, variants: list[Variant], baseline: Variant) -> dict[str, Figure]:
    """By their names, those that the sweep has data for."""
    figures = {"loss_compute": loss_against_compute(variants)}
    if distance_of(variants):
        figures["distance_cost"] = distance_against_cost(variants)
    if alike(variants, baseline):
        figures["scale_losses"] = scale_losses(variants, baseline)
    return figures | {f"axis_{axis}": against_axis(variants, axis) for axis in numeric_axes(sweep)}


def numeric_axes(sweep: Sweep) -> list[str]:
    """Axes of numbers of which at least two have finished cells."""
    done = {axis: {cell.axes[axis] for cell in sweep.finished} for axis in sweep.axes}
    return [axis for axis, values in done.items() if len(values) > 1 and all(map(is_number, values))]


def loss_against_compute(variants: list[Variant]) -> Figure:
    """Validation loss against the operations that training has spent so far, from left to right one run."""
    figure, (plot,) = panels(1)
    for variant, look in styled(variants):
        lines = [compute_curve(cell.measures, cell.curves["val/loss"]) for cell in variant.cells.values()]
        for line in lines:
            plot.plot(*zip(*line, strict=True), color=look["color"], linewidth=0.7, alpha=0.4)
        common = sorted(set.intersection(*({flops for flops, _ in line} for line in lines)))
        means = [fmean(dict(line)[flops] for line in lines) for flops in common]
        plot.plot(common, means, label=variant.name, markersize=5, **look)
    spread(plot)
    plot.set(xlabel="training compute so far (FLOPs)", ylabel=LOSS_LABEL)
    return finish(figure, plot)


def compute_curve(measures: dict[str, float], curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    return [(images * measures["flops_per_training_image"], value) for images, value in curve]


def distance_against_cost(variants: list[Variant]) -> Figure:
    """Frechet distance against what a network costs: operations for a sample, and parameters."""
    distance = distance_of(variants)
    assert distance is not None
    figure, plots = panels(len(COST_LABELS))
    for plot, (cost, label) in zip(plots, COST_LABELS.items(), strict=True):
        for variant, look in styled(variants):
            scatter(plot, variant, cost, distance, look)
        spread(plot)
        plot.set(xlabel=label)
    plots[0].set(ylabel=DISTANCE_LABELS[distance])
    return finish(figure, plots[0])


def scatter(plot: Plot, variant: Variant, cost: str, measure: str, look: Look) -> None:
    cells = [cell.measures for cell in variant.cells.values() if measure in cell.measures]
    if not cells:
        return
    xs, ys = [cell[cost] for cell in cells], [cell[measure] for cell in cells]
    plot.plot(xs, ys, color=look["color"], **SEED)
    plot.plot([fmean(xs)], [fmean(ys)], label=variant.name, **look | ALONE)


def scale_losses(variants: list[Variant], baseline: Variant) -> Figure:
    """Validation loss of each scale less the baseline's with the same seed, for variants on the same tokens."""
    others = alike(variants, baseline)
    tags = [tag for tag in next(iter(baseline.cells.values())).measures if tag.startswith(SCALE_LOSS)]
    figure, (plot,) = panels(1)
    looks = {variant.name: look for variant, look in styled(variants)}
    for index, variant in enumerate(others):
        look = looks[variant.name]
        places = [place + 0.8 * ((index + 0.5) / len(others) - 0.5) for place in range(len(tags))]
        pairs = [(cell.measures, baseline.cells[seed].measures) for seed, cell in shared(variant, baseline)]
        lines = [[ours[tag] - theirs[tag] for tag in tags] for ours, theirs in pairs]
        for line in lines:
            plot.plot(places, line, color=look["color"], **SEED)
        plot.plot(places, [fmean(values) for values in zip(*lines, strict=True)], label=variant.name, **look | ALONE)
    for place in range(0, len(tags), 2):  # every other scale on grey, so that neighbours are told apart
        plot.axvspan(place - 0.5, place + 0.5, color="0.95", zorder=0, linewidth=0)
    plot.axhline(0, color="0.3", linewidth=1)
    sides = [tag.removeprefix(SCALE_LOSS) for tag in tags]
    plot.set(xlim=(-0.5, len(tags) - 0.5), xticks=range(len(tags)), xticklabels=sides)
    plot.set(xlabel="side of the scale (tokens)", ylabel=f"loss less that of {baseline.name}\n(nats a token)")
    return finish(figure, plot)


def alike(variants: list[Variant], baseline: Variant) -> list[Variant]:
    """Variants other than the baseline that share a seed, the tokenizer and so the scales with it."""
    return [v for v in variants if v.name != baseline.name and shared(v, baseline)]


def shared(variant: Variant, baseline: Variant) -> list[tuple[int, Any]]:
    """Seeds of both, with the variant's cells, whose losses can be compared."""
    theirs = baseline.cells
    return [(s, cell) for s, cell in variant.cells.items() if s in theirs and comparable(cell, theirs[s], "val/loss")]


def against_axis(variants: list[Variant], axis: str) -> Figure:
    """Loss and Frechet distance against the numbers of an axis, a line for each combination of the other axes."""
    distance = distance_of(variants)
    labels = {"val/loss": LOSS_LABEL} | ({distance: DISTANCE_LABELS[distance]} if distance else {})
    figure, plots = panels(len(labels))
    for (name, line), look in zip(lines_along(variants, axis).items(), looks_in_turn(), strict=False):
        for plot, measure in zip(plots, labels, strict=True):
            draw_line(plot, line, axis, measure, name, look)
    values = sorted({variant.number(axis) for variant in variants if variant.cells})
    for plot, label in zip(plots, labels.values(), strict=True):
        spread(plot)
        plot.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        plot.set_xticks([], minor=True)
        plot.set(xlabel=axis.replace("_", " "), ylabel=label)
    return finish(figure, plots[0])


def lines_along(variants: list[Variant], axis: str) -> dict[str, list[Variant]]:
    """Variants that differ in the axis alone, in its order, by what they share; single ones make no line."""
    lines: dict[str, list[Variant]] = {}
    for variant in variants:
        if variant.cells:
            lines.setdefault(others_named(variant.axes, axis), []).append(variant)
    return {n: sorted(line, key=lambda v: v.number(axis)) for n, line in lines.items() if len(line) > 1}


def others_named(axes: Axes, axis: str) -> str:
    return ", ".join(f"{name} {value}" if is_number(value) else value for name, value in axes.items() if name != axis)


def draw_line(plot: Plot, line: list[Variant], axis: str, measure: str, name: str, look: Look) -> None:
    means = [(variant.number(axis), stat.mean) for variant in line if (stat := variant.stat(measure))]
    seeds = [
        (variant.number(axis), cell.measures[measure])
        for variant in line
        for cell in variant.cells.values()
        if measure in cell.measures
    ]
    if means:
        plot.plot(*zip(*seeds, strict=True), color=look["color"], **SEED)
        plot.plot(*zip(*means, strict=True), label=name, **look | OPEN)


def styled(variants: list[Variant]) -> Iterator[tuple[Variant, Look]]:
    """Variants with finished cells, each with the look that it has in every figure."""
    return ((v, look) for v, look in zip(variants, looks_in_turn(), strict=False) if v.cells)


def looks_in_turn() -> Iterator[Look]:
    for dash in cycle(DASHES):
        for index, colour in enumerate(COLOURS):
            marker = MARKERS[(index + len(COLOURS) * DASHES.index(dash)) % len(MARKERS)]
            yield {"color": colour, "marker": marker, "linestyle": dash}


def panels(count: int) -> tuple[Figure, list[Plot]]:
    """A figure with so many plots beside each other.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a report needs matplotlib: pip install 'lightning-mvar[report]'") from error
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    plots = list(figure.subplots(1, count, squeeze=False)[0])
    for plot in plots:
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(axis="y", color="0.9", linewidth=0.8)
        plot.set_axisbelow(True)
    return figure, plots


def spread(plot: Plot) -> None:
    """Make the x axis logarithmic where its numbers lie far apart; write them with the prefixes of SI units."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    low, high = plot.dataLim.intervalx
    if low > 0 and high > WIDE * low:
        plot.set_xscale("log")
        plot.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        plot.xaxis.set_minor_locator(LogLocator(subs=()))
    else:
        plot.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    plot.xaxis.set_major_formatter(EngFormatter(sep=" "))


def finish(figure: Figure, plot: Plot) -> Figure:
    """Explain the looks beside the plots, or below them where there are many."""
    handles, labels = plot.get_legend_handles_labels()
    below = len(labels) > BESIDE
    if below:
        figure.set_figheight(HEIGHT + LEGEND_ROW * -(-len(labels) // COLUMNS))
    place = {"loc": "outside lower center", "ncols": COLUMNS} if below else {"loc": "outside right upper"}
    figure.legend(handles, labels, fontsize="small", frameon=False, **place)
    return figure
