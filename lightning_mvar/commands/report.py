"""`report`: what the variants of a sweep have come to, with their spread over seeds, as tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.plugins.hparams import api_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_mvar.cli.arguments import call
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.hparams import columns, ended, row
from lightning_mvar.sweeps.figures import all_figures
from lightning_mvar.sweeps.results import CRASHED, FINISHED, CellResult, Sweep, is_number, read_results
from lightning_mvar.sweeps.tables import (
    TITLES,
    caution,
    cell_records,
    comparability,
    comparison_table,
    cost_table,
    results_table,
    scale_table,
    unfinished_table,
    variant_records,
    what_was_run,
    write_csv,
)
from lightning_mvar.sweeps.variants import Variant, choose_baseline, compare, variants_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATES = {FINISHED: api_pb2.STATUS_SUCCESS, CRASHED: api_pb2.STATUS_FAILURE}
CAPTIONS = {
    "loss_compute": "Validation loss against the operations spent on training so far: mean of the seeds, which are the "
    "thin lines.",
    "distance_cost": "Frechet distance against operations per sampled image and against parameters: mean and seeds.",
    "scale_losses": "Validation loss of each scale less the baseline's, paired by seed: mean and seeds. Below zero is "
    "better than the baseline.",
}


def report(folder: str, baseline: str | None = None, out: str | None = None) -> None:
    """Write what a sweep has found: report.md with tables and figures, variants.csv and cells.csv, and TensorBoard's
    table of all cells (`tensorboard --logdir FOLDER/report/hparams`).

    A variant is what cells share that differ in the seed alone; only finished cells count, the others are listed.

    Args:
        folder: of a sweep, finished or not.
        baseline: the variant that the others are compared with, paired by seed; the first in the sweep's order that
            has finished cells where none is named.
        out: where to write; FOLDER/report where not said.
    """
    sweep = read_results(folder)
    variants = variants_of(sweep)
    base = choose_baseline(variants, baseline)
    target = Path(folder) / "report" if out is None else Path(out)
    figures = all_figures(sweep, variants, base)
    text = document(sweep, variants, base, list(figures))
    for name, figure in figures.items():
        write_figure(figure, target / f"{name}.png")
    write_csv(target / "variants.csv", variant_records(variants))
    write_csv(target / "cells.csv", cell_records(sweep.cells))
    write_hparams(sweep, target / "hparams")
    with atomic_path(target / "report.md") as path:
        path.write_text(text)
    print(results_table(variants))
    if sweep.unfinished:
        print(f"\n{len(sweep.unfinished)} of {len(sweep.cells)} cells have not finished, see the report")
    print(f"\n{target / 'report.md'}")


def document(sweep: Sweep, variants: list[Variant], baseline: Variant, figures: list[str]) -> str:
    """The report as Markdown."""
    comparisons = compare(variants, baseline)
    example = next(iter(baseline.cells.values()))
    parts = [
        f"# Sweep {sweep.folder.resolve().name}",
        "\n".join(what_was_run(sweep, variants)),
        f"The commands of {example.name}, each after `lightning-mvar`; those of the others are in their cell.json:",
        "\n".join(["```", *example.commands, "```"]),
        "## Results",
        "Mean ± standard deviation (n - 1) over seeds of the last values; losses in nats a token.",
        str(results_table(variants)),
        *comparability(sweep),
        "## Costs",
        "Training images/s is the median over each run on the machine it ran on.",
        str(cost_table(variants)),
        "## Loss of each scale",
        "Validation loss by the side of the scale, in nats a token.",
        str(scale_table(variants)),
        "## Differences to the baseline",
        f"Each variant less {baseline.name}, with the same seed. {caution(comparisons)}",
        *([str(comparison_table(comparisons))] if comparisons else []),
        "## Figures",
        *[f"![{caption(name)}]({name}.png)\n\n{caption(name)}" for name in figures],
        "## Cells that have not finished",
        str(unfinished_table(sweep)) if sweep.unfinished else "None.",
        "## The sweep's file",
        f"```yaml\n{sweep.text.rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def caption(name: str) -> str:
    axis = name.removeprefix("axis_")
    return CAPTIONS.get(name, f"Results against {axis}, a line for each value of the other axes: mean and seeds.")


def write_figure(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def write_hparams(sweep: Sweep, folder: Path) -> None:
    """A run for each cell in TensorBoard's table: axes and seed, and the last value of every measure."""
    for old in folder.glob("*/events.out.tfevents.*"):  # of an earlier report
        old.unlink()
    occurring = {name for cell in sweep.finished for name in cell.measures}
    metrics = [name for name in TITLES if name in occurring]
    for cell in sweep.cells:
        values = hyperparameters(cell)
        with SummaryWriter(str(folder / cell.name)) as writer:
            state = STATES.get(cell.status, api_pb2.STATUS_RUNNING)
            for summary in (columns(values, metrics, values), row(values), ended(state)):
                writer._get_file_writer().add_summary(summary)
            for name in metrics:
                if name in cell.measures:
                    writer.add_scalar(name, cell.measures[name], 0)


def hyperparameters(cell: CellResult) -> dict[str, float | int | str]:
    axes = {axis: float(value) if is_number(value) else value for axis, value in cell.axes.items()}
    return {**axes, "seed": cell.seed}


def main(argv: list[str]) -> None:
    call(report, argv, positional=True)
