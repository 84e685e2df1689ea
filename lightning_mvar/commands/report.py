"""`report`: tables and figures of a sweep's variants, with their spread over seeds."""

from __future__ import annotations

from pathlib import Path

from tensorboard.plugins.hparams import api_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, path_component
from lightning_mvar.io.hparams import columns_summary, end_summary, row_summary
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.sweeps.figures import all_figures
from lightning_mvar.sweeps.measures import TITLES
from lightning_mvar.sweeps.results import CellResult, Sweep, is_number, read_results
from lightning_mvar.sweeps.tables import (
    cell_records,
    comparability_notes,
    comparison_table,
    cost_table,
    results_table,
    scale_table,
    significance_note,
    spread_table,
    sweep_summary,
    unfinished_table,
    variant_records,
    write_csv,
)
from lightning_mvar.sweeps.variants import Variant, choose_baseline, compare, compared_measures, variants_of

HPARAMS_STATUS = {"finished": api_pb2.STATUS_SUCCESS, "crashed": api_pb2.STATUS_FAILURE}
CAPTIONS = {
    "loss_compute": "Validation loss against the FLOPs spent on training so far: mean and seeds (thin lines).",
    "distance_cost": "Frechet distance against FLOPs per sampled image and against parameters: mean and seeds.",
    "scale_losses": "Validation loss per scale minus the baseline's, paired by seed: mean and seeds. Below zero is "
    "better than the baseline.",
}


def report(folder: str, baseline: str | None = None, out: str | None = None) -> None:
    """Writes the report of a sweep: report.md with tables and figures, CSV files and a TensorBoard table.

    `tensorboard --logdir FOLDER/report/hparams` shows the table of all cells. A variant is a set of cells that differ
    only in the seed. Only finished cells count; the others are listed.

    Args:
        folder: folder of a sweep, finished or not.
        baseline: variant that the others are compared with, paired by seed; default: that of the sweep file, or else
            the first variant of the sweep that has finished cells.
        out: folder to write to; default: FOLDER/report.
    """
    sweep = read_results(folder)
    variants = variants_of(sweep)
    baseline_variant = choose_baseline(variants, baseline or sweep.plan.baseline)
    target = Path(folder) / "report" if out is None else Path(out)
    if out is None:
        refuse_links(target)
    figures = all_figures(sweep, variants, baseline_variant)
    text = render_markdown(sweep, variants, baseline_variant, list(figures))
    with lock_folder(target, "report"):
        for name, figure in figures.items():
            with atomic_path(target / f"{name}.png") as path:
                figure.savefig(path)
        write_csv(target / "variants.csv", variant_records(variants))
        write_csv(target / "cells.csv", cell_records(sweep.cells))
        write_hparams(sweep, target / "hparams")
        with atomic_path(target / "report.md") as path:
            path.write_text(text)
    print(results_table(variants))
    if sweep.unfinished:
        print(f"\n{len(sweep.unfinished)} of {len(sweep.cells)} cells have not finished: see the report")
    print(f"\n{target / 'report.md'}")


def render_markdown(sweep: Sweep, variants: list[Variant], baseline: Variant, figures: list[str]) -> str:
    """Renders the report as Markdown."""
    comparisons = compare(variants, baseline, sweep.plan.compare)
    example = next(iter(baseline.cells.values()))
    parts = [
        f"# Sweep {sweep.folder.resolve().name}",
        "\n".join(sweep_summary(sweep, variants)),
        f"The commands of {example.name}, without `lightning-mvar`; those of every cell are in its cell.json:",
        "\n".join(["```", *example.commands, "```"]),
        "## Results",
        "Mean ± standard deviation (n - 1) over seeds of the final values; losses in nats per token.",
        str(results_table(variants)),
        *comparability_notes(sweep),
        *(spread_section(sweep, variants) if sweep.plan.sampling_seeds else []),
        *(training_sections(variants) if sweep.plan.fit is not None else []),
        "## Differences to the baseline",
        f"Each variant minus {baseline.name}, paired by seed. {significance_note(comparisons)}",
        *([str(comparison_table(comparisons))] if comparisons else []),
        "## Figures",
        *[f"![{caption(name)}]({name}.png)\n\n{caption(name)}" for name in figures],
        "## Cells that have not finished",
        *([str(unfinished_table(sweep))] if sweep.unfinished else ["None."]),
        "## The sweep file",
        f"```yaml\n{sweep.text.rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def spread_section(sweep: Sweep, variants: list[Variant]) -> list[str]:
    return [
        "## Spread",
        "A seed's value is the mean over its sampling seeds; mean, standard error and deviation (n - 1) are those of "
        "the seeds' values. The last column is the deviation between sampling seeds of the same network.",
        str(spread_table(variants, compared_measures(variants, sweep.plan.compare))),
    ]


def training_sections(variants: list[Variant]) -> list[str]:
    return [
        "## Costs",
        "Training images/s is the median over a run, on the machine of that run.",
        str(cost_table(variants)),
        "## Loss of each scale",
        "Validation loss by the side length of the scale, in nats per token.",
        str(scale_table(variants)),
    ]


def caption(name: str) -> str:
    axis = name.removeprefix("axis_")
    return CAPTIONS.get(name, f"Results against {axis}, one line per combination of the other axes: mean and seeds.")


def refuse_links(folder: Path) -> None:
    """Raises InputError if the report folder of a copied sweep has links, whose targets would be overwritten."""
    if link := next((path for path in (folder, *folder.rglob("*")) if path.is_symlink()), None):
        raise InputError(f"{link} is a link: remove it, or name another folder with --out")


def write_hparams(sweep: Sweep, folder: Path) -> None:
    """Writes one run per cell for TensorBoard's hparams table: axes, seed, and the final value of every measure."""
    for old in folder.glob("*/events.out.tfevents.*"):  # from an earlier report
        old.unlink()
    present = {name for cell in sweep.finished for name in cell.measures}
    metrics = [name for name in TITLES if name in present]
    for cell in sweep.cells:
        values = hyperparameters(cell)
        with SummaryWriter(str(folder / path_component(cell.name))) as writer:
            state = HPARAMS_STATUS.get(cell.status, api_pb2.STATUS_RUNNING)
            for summary in (columns_summary(values, metrics, values), row_summary(values), end_summary(state)):
                writer._get_file_writer().add_summary(summary)
            for name in metrics:
                if name in cell.measures:
                    writer.add_scalar(name, cell.measures[name], 0)


def hyperparameters(cell: CellResult) -> dict[str, float | int | str]:
    axes = {axis: float(value) if is_number(value) else value for axis, value in cell.axes.items()}
    return {**axes, "seed": cell.seed}
