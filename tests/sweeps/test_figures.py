"""Figures of a sweep: the numbers on their lines, and legends that do not cover the plots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sweep_folder
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sweep_folder import BATCH, DEPTHS, MIXERS, SEEDS, SIDES, STEPS, write_sweep

from lightning_mvar.sweeps.figures import all_figures, style_cycle
from lightning_mvar.sweeps.results import Sweep, read_results
from lightning_mvar.sweeps.variants import Variant, variants_of

NAMES = [f"{mixer}-depth{depth}" for mixer in MIXERS for depth in DEPTHS]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return read_results(write_sweep(tmp_path_factory.mktemp("sweeps") / "tiny"))


@pytest.fixture(scope="module")
def variants(sweep: Sweep) -> list[Variant]:
    return variants_of(sweep)


@pytest.fixture(scope="module")
def figures(sweep: Sweep, variants: list[Variant]) -> dict[str, Figure]:
    return all_figures(sweep, variants, variants[0])


def named(plot: Axes) -> dict[str, np.ndarray]:
    """Returns the points (n, 2) of the lines in the legend, by label."""
    return {str(ln.get_label()): ln.get_xydata() for ln in plot.lines if not str(ln.get_label()).startswith("_")}


def unnamed(plot: Axes) -> list[tuple[float, float]]:
    """Returns the points of all lines that are not in the legend."""
    return [tuple(p) for ln in plot.lines if str(ln.get_label()).startswith("_") for p in ln.get_xydata()]


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def test_loss_against_compute(figures: dict[str, Figure]) -> None:
    (plot,) = figures["loss_compute"].axes
    lines = named(plot)
    assert list(lines) == NAMES
    flops = [3000 * sweep_folder.parameters("var", "10") * BATCH * (step + 1) for step in STEPS]
    losses = [mean([sweep_folder.loss("var", "10", seed, step) for seed in SEEDS]) for step in STEPS]
    np.testing.assert_allclose(lines["var-depth10"], np.stack([flops, losses], axis=1), rtol=1e-6)
    thin = unnamed(plot)
    assert len(thin) == len(NAMES) * len(SEEDS) * len(STEPS)
    assert (flops[1], pytest.approx(sweep_folder.loss("var", "10", 2, STEPS[1]))) in thin


def test_distance_against_cost(figures: dict[str, Figure]) -> None:
    sampling, parameters = figures["distance_cost"].axes
    y = mean([sweep_folder.distance("markov", "2", seed) for seed in SEEDS])
    for plot, cost in ((sampling, 2000), (parameters, 1)):
        x = cost * sweep_folder.parameters("markov", "2")
        np.testing.assert_allclose(named(plot)["markov-depth2"], [[x, y]])
        assert {(x, sweep_folder.distance("markov", "2", seed)) for seed in SEEDS} <= set(unnamed(plot))
    assert "FLOPs" in sampling.get_xlabel()


def test_losses_of_scales_are_differences_with_the_same_seed(figures: dict[str, Figure]) -> None:
    (plot,) = figures["scale_losses"].axes
    lines = named(plot)
    assert list(lines) == NAMES[1:]
    expected = [
        [sweep_folder.scale_loss("var", "2", s, side) - sweep_folder.scale_loss("mvar", "2", s, side) for s in SEEDS]
        for side in SIDES
    ]
    np.testing.assert_allclose(lines["var-depth2"][:, 1], np.mean(expected, axis=1), atol=1e-5)
    np.testing.assert_allclose(np.round(lines["var-depth2"][:, 0]), range(len(SIDES)))  # near the tick of its scale
    points = np.array([y for _, y in unnamed(plot)])
    assert all(np.abs(points - value).min() < 1e-5 for value in np.ravel(expected))
    assert [tick.get_text() for tick in plot.get_xticklabels()] == ["1", "2", "4"]


def test_an_axis_of_numbers_has_a_line_for_each_value_of_the_others(figures: dict[str, Figure]) -> None:
    assert [name for name in figures if name.startswith("axis_")] == ["axis_depth"]  # not for named values
    losses, distances = figures["axis_depth"].axes
    assert list(named(losses)) == list(named(distances)) == list(MIXERS)
    means = [[int(d), mean([sweep_folder.loss("markov", d, seed) for seed in SEEDS])] for d in DEPTHS]
    np.testing.assert_allclose(named(losses)["markov"], means, rtol=1e-6)
    assert len(unnamed(losses)) == len(NAMES) * len(SEEDS)
    assert [tick.get_text() for tick in losses.get_xticklabels()] == ["2", "10"]


def test_legends_lie_beside_the_plots(figures: dict[str, Figure]) -> None:
    for figure in figures.values():
        figure.draw_without_rendering()
        (legend,) = figure.legends
        for plot in figure.axes:
            assert not legend.get_window_extent().overlaps(plot.get_window_extent())


def test_a_variant_has_one_style_in_all_figures_that_differs_from_others(figures: dict[str, Figure]) -> None:
    colors = [
        {ln.get_label(): ln.get_color() for ln in figures[n].axes[0].lines} for n in ("loss_compute", "distance_cost")
    ]
    assert {name: colors[0][name] for name in NAMES} == {name: colors[1][name] for name in NAMES}
    styles = [style for style, _ in zip(style_cycle(), range(20), strict=False)]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 20


def test_a_single_cell_without_scores_has_only_the_loss_figure(sweep: Sweep) -> None:
    (cell, *_) = sweep.cells
    measures = {name: value for name, value in cell.measures.items() if name != "frechet_distance"}
    one = replace(sweep, cells=[replace(cell, measures=measures)])
    variants = variants_of(one)
    assert list(all_figures(one, variants, variants[0])) == ["loss_compute"]
