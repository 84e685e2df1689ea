"""Figures of a sweep: each variant's mean over seeds, and every seed as a point or a thin line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_mvar.errors import require_package
from lightning_mvar.sweeps.measures import SCALE_LOSS, TITLES
from lightning_mvar.sweeps.results import Sweep, is_number
from lightning_mvar.sweeps.variants import Variant, comparable, compared_measures, distance_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot
    from matplotlib.figure import Figure

Style = dict[str, Any]

# The color-blind safe palette of Okabe and Ito, without its yellow, which is too pale on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<>hp*"
DASHES = ("-", "--", ":")
WIDTH, HEIGHT = 10.0, 4.4  # inches; 1000 pixels at DPI
DPI = 100
MAX_SIDE_LEGEND = 8  # legend entries that fit beside the plots; more go below, in columns
LEGEND_COLUMNS = 3
LEGEND_ROW_HEIGHT = 0.2  # inches
LOG_SCALE_RATIO = 5  # an axis is logarithmic if largest / smallest exceeds this
NO_LINE: Style = {"linestyle": "none"}
SEED_STYLE: Style = NO_LINE | {"marker": ".", "markersize": 5, "alpha": 0.6}
# Means are open markers so that the points of the seeds show through.
MEAN_STYLE: Style = {"markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1.5}

LOSS_LABEL = "validation loss (nats per token)"
LABELS = {"val/loss": LOSS_LABEL}  # other measures have their titles
COST_LABELS = {"flops_per_sampled_image": "FLOPs per sampled image", "parameters": "parameters"}


def all_figures(sweep: Sweep, variants: list[Variant], baseline: Variant) -> dict[str, Figure]:
    """Returns the figures that the sweep has data for, by name."""
    measures = compared_measures(variants, sweep.plan.compare)
    values = {axis: {cell.axes[axis] for cell in sweep.finished} for axis in sweep.axes}
    numeric = [axis for axis, names in values.items() if len(names) > 1 and all(map(is_number, names))]
    figures = {f"axis_{axis}": against_axis(variants, axis, measures) for axis in numeric}
    if sweep.plan.fit is None:
        return figures
    training = {"loss_compute": loss_against_compute(variants)}
    if distance_of(variants):
        training["distance_cost"] = distance_against_cost(variants)
    if comparable_variants(variants, baseline):
        training["scale_losses"] = scale_losses(variants, baseline)
    return training | figures


def loss_against_compute(variants: list[Variant]) -> Figure:
    """Plots validation loss against the FLOPs spent on training so far; each line is one run."""
    figure, (plot,) = make_panels(1)
    for variant, style in styled(variants):
        lines = [
            [(images * cell.measures["flops_per_training_image"], loss) for images, loss in cell.curves["val/loss"]]
            for cell in variant.cells.values()
        ]
        for line in lines:
            plot.plot(*zip(*line, strict=True), color=style["color"], linewidth=0.7, alpha=0.4)
        common = sorted(set.intersection(*({flops for flops, _ in line} for line in lines)))
        means = [fmean(dict(line)[flops] for line in lines) for flops in common]
        plot.plot(common, means, label=variant.name, markersize=5, **style)
    format_x_axis(plot)
    plot.set(xlabel="training compute so far (FLOPs)", ylabel=LOSS_LABEL)
    return add_legend(figure, plot)


def distance_against_cost(variants: list[Variant]) -> Figure:
    """Plots Frechet distance against the cost of a network: FLOPs per sampled image, and parameters."""
    distance = distance_of(variants)
    assert distance is not None
    figure, plots = make_panels(len(COST_LABELS))
    for plot, (cost, label) in zip(plots, COST_LABELS.items(), strict=True):
        for variant, style in styled(variants):
            cells = [cell.measures for cell in variant.cells.values() if distance in cell.measures]
            draw_means(plot, [[(cell[cost], cell[distance]) for cell in cells]], variant.name, style | NO_LINE)
        format_x_axis(plot)
        plot.set(xlabel=label)
    plots[0].set(ylabel=TITLES[distance])
    return add_legend(figure, plots[0])


def draw_means(plot: Plot, groups: list[list[tuple[float, float]]], label: str, style: Style) -> None:
    """Draws the seeds of each group as points (x, y), and the mean of each group as a marker."""
    groups = [group for group in groups if group]
    if groups:
        plot.plot(*zip(*chain(*groups), strict=True), color=style["color"], **SEED_STYLE)
        means = [tuple(map(fmean, zip(*group, strict=True))) for group in groups]
        plot.plot(*zip(*means, strict=True), label=label, **style | MEAN_STYLE)


def scale_losses(variants: list[Variant], baseline: Variant) -> Figure:
    """Plots each scale's validation loss minus the baseline's of the same seed, for variants on the same tokens."""
    others = comparable_variants(variants, baseline)
    tags = [tag for tag in next(iter(baseline.cells.values())).measures if tag.startswith(SCALE_LOSS)]
    figure, (plot,) = make_panels(1)
    styles = {variant.name: style for variant, style in styled(variants)}
    for index, variant in enumerate(others):
        style = styles[variant.name]
        positions = [position + 0.8 * ((index + 0.5) / len(others) - 0.5) for position in range(len(tags))]
        pairs = [(cell.measures, baseline.cells[seed].measures) for seed, cell in shared_seeds(variant, baseline)]
        groups = [
            [(position, ours[tag] - theirs[tag]) for ours, theirs in pairs]
            for position, tag in zip(positions, tags, strict=True)
        ]
        draw_means(plot, groups, variant.name, style | NO_LINE)
    for position in range(0, len(tags), 2):  # every other scale on gray separates neighbors
        plot.axvspan(position - 0.5, position + 0.5, color="0.95", zorder=0, linewidth=0)
    plot.axhline(0, color="0.3", linewidth=1)
    sides = [tag.removeprefix(SCALE_LOSS) for tag in tags]
    plot.set(xlim=(-0.5, len(tags) - 0.5), xticks=range(len(tags)), xticklabels=sides)
    plot.set(xlabel="side length of the scale (tokens)", ylabel=f"loss minus that of {baseline.name}\n(nats per token)")
    return add_legend(figure, plot)


def comparable_variants(variants: list[Variant], baseline: Variant) -> list[Variant]:
    """Returns the variants that share a seed and the tokenizer, and so the scales, with the baseline."""
    return [v for v in variants if v.name != baseline.name and shared_seeds(v, baseline)]


def shared_seeds(variant: Variant, baseline: Variant) -> list[tuple[int, Any]]:
    """Returns (seed, variant's cell) for each seed of both whose losses are comparable."""
    theirs = baseline.cells
    return [(s, cell) for s, cell in variant.cells.items() if s in theirs and comparable(cell, theirs[s], "val/loss")]


def against_axis(variants: list[Variant], axis: str, measures: list[str]) -> Figure:
    """Plots measures along a numeric axis, with one line per combination of the other axes."""
    labels = {measure: LABELS.get(measure, TITLES[measure]) for measure in measures}
    figure, plots = make_panels(len(labels))
    for (name, line), style in zip(lines_along_axis(variants, axis).items(), style_cycle(), strict=False):
        for plot, measure in zip(plots, labels, strict=True):
            groups = [
                [(v.number(axis), c.measures[measure]) for c in v.cells.values() if measure in c.measures] for v in line
            ]
            draw_means(plot, groups, name, style)
    values = sorted({variant.number(axis) for variant in variants if variant.cells})
    for plot, label in zip(plots, labels.values(), strict=True):
        format_x_axis(plot)
        plot.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        plot.set_xticks([], minor=True)
        plot.set(xlabel=axis.replace("_", " "), ylabel=label)
    return add_legend(figure, plots[0])


def lines_along_axis(variants: list[Variant], axis: str) -> dict[str, list[Variant]]:
    """Groups variants that differ only along the axis, sorted by its value; single variants make no line."""
    lines: dict[str, list[Variant]] = {}
    for variant in variants:
        if variant.cells:
            others = [f"{name} {v}" if is_number(v) else v for name, v in variant.axes.items() if name != axis]
            lines.setdefault(", ".join(others), []).append(variant)
    return {n: sorted(line, key=lambda v: v.number(axis)) for n, line in lines.items() if len(line) > 1}


def styled(variants: list[Variant]) -> Iterator[tuple[Variant, Style]]:
    """Yields the variants with finished cells, each with the style that it has in every figure."""
    return ((v, style) for v, style in zip(variants, style_cycle(), strict=False) if v.cells)


def style_cycle() -> Iterator[Style]:
    for dash in cycle(DASHES):
        for index, color in enumerate(COLORS):
            marker = MARKERS[(index + len(COLORS) * DASHES.index(dash)) % len(MARKERS)]
            yield {"color": color, "marker": marker, "linestyle": dash}


def make_panels(count: int) -> tuple[Figure, list[Plot]]:
    """Returns a figure with `count` plots side by side; raises InputError if matplotlib is not installed."""
    require_package("matplotlib", "report", "a report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    plots = list(figure.subplots(1, count, squeeze=False)[0])
    for plot in plots:
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(axis="y", color="0.9", linewidth=0.8)
        plot.set_axisbelow(True)
    return figure, plots


def format_x_axis(plot: Plot) -> None:
    """Makes the x axis logarithmic if its values span a wide range; formats its ticks with SI prefixes."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    low, high = plot.dataLim.intervalx
    if low > 0 and high > LOG_SCALE_RATIO * low:
        plot.set_xscale("log")
        plot.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        plot.xaxis.set_minor_locator(LogLocator(subs=()))
    else:
        plot.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    plot.xaxis.set_major_formatter(EngFormatter(sep=" "))


def add_legend(figure: Figure, plot: Plot) -> Figure:
    """Adds the legend beside the plots, or below them if it is long."""
    handles, labels = plot.get_legend_handles_labels()
    below = len(labels) > MAX_SIDE_LEGEND
    if below:
        figure.set_figheight(HEIGHT + LEGEND_ROW_HEIGHT * -(-len(labels) // LEGEND_COLUMNS))
    location = {"loc": "outside lower center", "ncols": LEGEND_COLUMNS} if below else {"loc": "outside right upper"}
    figure.legend(handles, labels, fontsize="small", frameon=False, **location)
    return figure
