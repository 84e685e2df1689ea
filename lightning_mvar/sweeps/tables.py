"""Tables of a sweep: rounded Markdown for readers, CSV in full precision for programs."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mvar.io.files import atomic_path
from lightning_mvar.sweeps.measures import COSTS, RATES, SCALE_LOSS, SCORES, TITLES, TRAINING_SCORES
from lightning_mvar.sweeps.results import CellResult, Sweep
from lightning_mvar.sweeps.variants import Comparison, Stat, Variant, smallest_significant_difference

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True, repr=False)
class Table:
    head: list[str]
    rows: list[list[str]]

    def __repr__(self) -> str:
        """Formats the table as Markdown whose source is aligned."""
        lines = [self.head, *self.rows]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * width for width in widths]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])

    def _repr_markdown_(self) -> str:
        """Renders the table in notebooks."""
        return repr(self)


def sweep_summary(sweep: Sweep, variants: list[Variant]) -> list[str]:
    """Lists axes, seeds, cells, time and attempts, and the missing seeds of each variant."""
    states = Counter(cell.status for cell in sweep.cells)
    seconds, tries = sum(cell.seconds for cell in sweep.cells), sum(cell.tries for cell in sweep.cells)
    lines = [f"- {axis}: {', '.join(values)}" for axis, values in sweep.axes.items()]
    sampling = sweep.plan.sampling_seeds
    lines += [
        f"- seeds: {', '.join(map(str, sweep.plan.seeds))}",
        *([f"- sampling seeds of each cell: {', '.join(map(str, sampling))}"] if sampling else []),
        f"- {len(sweep.cells)} cells of {len(variants)} variants: {', '.join(f'{n} {s}' for s, n in states.items())}",
        f"- attempts: {tries}, {duration(seconds)} in total without those that were killed; cells with more than "
        f"one attempt: {sum(cell.tries > 1 for cell in sweep.cells)}",
    ]
    lines += [
        f"- {variant.name}: {len(variant.cells)} of {len(variant.cells) + len(variant.missing)} seeds, missing "
        f"{', '.join(map(str, variant.missing))}"
        for variant in variants
        if variant.missing
    ]
    return lines


def comparability_notes(sweep: Sweep) -> list[str]:
    """States which numbers in a table are comparable, and the evaluation conditions."""
    notes = []
    tokenizers = sorted({cell.tokenizer for cell in sweep.finished})
    if len(tokenizers) > 1:
        notes.append(
            f"The cells use tokens of {len(tokenizers)} tokenizers ({', '.join(tokenizers)}): losses are comparable "
            "only among variants on the same tokens, scores of images among all variants."
        )
    conditions = [cell.conditions for cell in sweep.finished if cell.conditions]
    if any(other != conditions[0] for other in conditions):
        differing = [key for key in conditions[0] if len({str(cell.get(key)) for cell in conditions}) > 1]
        notes.append(
            f"The cells were scored under different conditions ({', '.join(differing)} differ): "
            "their scores are not comparable."
        )
    elif conditions:
        notes.append(f"Scored with {', '.join(f'{key} {value}' for key, value in conditions[0].items())}.")
    return notes


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def results_table(variants: list[Variant]) -> Table:
    """Returns losses and scores of each variant, mean ± standard deviation over its seeds."""
    scores = SCORES if any(variant.stat("frechet_distance") for variant in variants) else TRAINING_SCORES
    return stats_table(variants, ["val/loss", "val/loss_last_scale", *scores])


def cost_table(variants: list[Variant]) -> Table:
    return stats_table(variants, [*COSTS, *RATES])


def scale_table(variants: list[Variant]) -> Table:
    """Returns the validation loss per scale, by side length."""
    return stats_table(variants, scale_tags(variants))


def scale_tags(variants: list[Variant]) -> list[str]:
    """Returns the validation-loss tags of all scales, coarse to fine."""
    measures = {tag for variant in variants for cell in variant.cells.values() for tag in cell.measures}
    tags = [tag for tag in measures if tag.startswith(SCALE_LOSS)]
    return sorted(tags, key=lambda tag: [int(side) for side in tag.removeprefix(SCALE_LOSS).split("x")])


def stats_table(variants: list[Variant], measures: Sequence[str]) -> Table:
    """Returns one row per variant and one column per measure that any variant has."""
    present = [measure for measure in measures if any(variant.stat(measure) for variant in variants)]
    titles = [TITLES.get(measure, measure.removeprefix(SCALE_LOSS)) for measure in present]
    rows = [
        [
            variant.name,
            str(len(variant.cells)),
            *(format_stat(variant.stat(measure), len(variant.cells)) for measure in present),
        ]
        for variant in variants
    ]
    return Table(["variant", "seeds", *titles], rows)


def format_stat(stat: Stat | None, seeds: int) -> str:
    """Formats mean ± deviation to two digits of the deviation, with the number of seeds if some lack the measure."""
    if stat is None:
        return ""
    count = f" (n = {stat.n})" if stat.n != seeds else ""
    if not stat.deviation:  # all values are equal, or there is one seed
        return number(stat.mean) + count
    if not math.isfinite(stat.deviation) or stat.mean >= 1e5:
        return f"{number(stat.mean)} ± {number(stat.deviation)}{count}"
    digits = max(0, 1 - math.floor(math.log10(stat.deviation)))
    return f"{stat.mean:.{digits}f} ± {stat.deviation:.{digits}f}{count}"


def number(value: float) -> str:
    """Formats a number with four significant digits, and an SI prefix if it is large."""
    if not math.isfinite(value) or abs(value) < 1e4:
        return f"{value:.4g}"
    thousands = min(int(math.log10(abs(value)) / 3), len(PREFIXES) - 1)
    return f"{value / 1000**thousands:.4g} {PREFIXES[thousands]}"


def spread_table(variants: list[Variant], measures: Sequence[str]) -> Table:
    """Returns the spread of each measure between training seeds, and between sampling seeds of the same network."""
    head = ["variant", "measure", "seeds", "mean", "standard error", "deviation", "deviation between sampling seeds"]
    stats = [(v, measure, stat) for measure in measures for v in variants if (stat := v.stat(measure))]
    rows = [
        [
            variant.name,
            TITLES[measure],
            str(stat.n),
            number(stat.mean),
            *(
                "" if spread is None else f"{spread:.2g}"
                for spread in (stat.standard_error, stat.deviation, stat.sampling_deviation)
            ),
        ]
        for variant, measure, stat in stats
    ]
    return Table(head, rows)


def comparison_table(comparisons: list[Comparison]) -> Table:
    head = ["variant", "measure", "seeds", "difference", "deviation", "95 % interval", "p", "significant (Holm)"]
    return Table(head, [comparison_row(comparison) for comparison in comparisons])


def comparison_row(comparison: Comparison) -> list[str]:
    identity = [comparison.variant, TITLES[comparison.measure], str(len(comparison.seeds))]
    if math.isnan(comparison.mean):
        return [*identity, "", "", "", "", comparison.reason]
    values = [f"{comparison.mean:+.4g}", f"{comparison.deviation:.2g}"]
    if comparison.reason:
        return [*identity, *values, "", "", comparison.reason]
    low, high = comparison.interval
    significant = "**yes**" if comparison.significant else "no"
    return [*identity, *values, f"{low:+.4g} to {high:+.4g}", f"{comparison.p:.2g}", significant]


def significance_note(comparisons: list[Comparison]) -> str:
    """States the number of tests and the smallest difference that this many seeds can show to be significant."""
    tested = [comparison for comparison in comparisons if not comparison.reason]
    if not tested:
        return "No variant can be tested against the baseline: a test needs two seeds in common."
    seeds, _ = Counter(len(comparison.seeds) for comparison in tested).most_common(1)[0]
    single, corrected = smallest_significant_difference(seeds, 1), smallest_significant_difference(seeds, len(tested))
    return (
        f"{len(tested)} comparisons, each a two-sided t-test of differences between runs of the same seed; the last "
        f"column is after Holm's correction for all {len(tested)}. With {seeds} seeds such a test has {seeds - 1} "
        f"{'degree' if seeds == 2 else 'degrees'} of freedom: a mean difference must be {single:.1f} standard "
        f"deviations of the differences for p < 0.05, and {corrected:.1f} if the level is split among {len(tested)}. "
        "A difference that is not significant does not show equality; one that is holds for the spread of these seeds, "
        "not for other data, sizes or training lengths."
    )


def unfinished_table(sweep: Sweep) -> Table:
    rows = [[cell.name, cell.status, str(cell.tries), f"{cell.seconds:.0f} s"] for cell in sweep.unfinished]
    return Table(["cell", "state", "tries", "time"], rows)


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one line per record, with a column for each key of any record."""
    names = list(dict.fromkeys(name for record in records for name in record))
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def variant_records(variants: list[Variant]) -> list[dict[str, Any]]:
    """Returns all measures of each variant: `NAME_mean` and `NAME_std` (n - 1, empty for one seed).

    With sampling seeds also `NAME_sampling_std`, see `Stat`.
    """
    names = list(dict.fromkeys([*TITLES, *scale_tags(variants)]))
    records = []
    for variant in variants:
        seeds = {"seeds": len(variant.cells), "missing_seeds": " ".join(map(str, variant.missing))}
        record: dict[str, Any] = {"variant": variant.name, **variant.axes, **seeds}
        for name in names:
            if stat := variant.stat(name):
                record |= {f"{name}_mean": stat.mean, f"{name}_std": "" if stat.deviation is None else stat.deviation}
                if stat.sampling_deviation is not None:
                    record[f"{name}_sampling_std"] = stat.sampling_deviation
        records.append(record)
    return records


def cell_records(cells: list[CellResult]) -> list[dict[str, Any]]:
    """Returns one record per cell, finished or not, with its measures; with sampling seeds, one per cell and seed."""
    records = []
    for cell in cells:
        record = {"cell": cell.name, **cell.axes, "seed": cell.seed}
        state = {"status": cell.status, "tries": cell.tries, "attempts_s": cell.seconds}
        if cell.draws:
            records += [record | {"sampling_seed": s} | state | cell.measures | cell.draws[s] for s in cell.draws]
        else:
            records.append(record | state | cell.measures)
    return records
