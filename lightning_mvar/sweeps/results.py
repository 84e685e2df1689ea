"""Results of a sweep's cells, read from the sweep's folder.

A cell is one training run with one seed; a variant is a set of cells that differ only in the seed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from lightning_mvar.errors import InputError, one_line
from lightning_mvar.io.files import open_regular
from lightning_mvar.io.hparams import read_row
from lightning_mvar.io.json_files import checked, shown
from lightning_mvar.models.costs import Costs
from lightning_mvar.sweeps.cells import Cell, State, attempts, read_record
from lightning_mvar.sweeps.measures import COSTS, LOSSES, RATES, SCALE_LOSS, SCORES, TRAINING_RATE, TRAINING_SCORES
from lightning_mvar.sweeps.plan import SweepFile, score_files
from lightning_mvar.sweeps.sweep_file import read_sweep

REWRITE = "run the command of cell.json that writes it again, after `lightning-mvar`"
Scalar = bool | int | float | str | None
Axes = dict[str, str]  # axis -> name of the value
Curve = list[tuple[int, float]]  # images trained on, value

SCALE_TAG = re.compile(rf"{SCALE_LOSS}[0-9]{{1,6}}(x[0-9]{{1,6}})?")
MAX_BATCH = 2**31  # images
MAX_RECORD_BYTES = 2**28  # of an event file
MAX_NUMBER = 3.4e38  # of float32
# Evaluation conditions: scores are comparable only if all of these agree.
CONDITIONS = ("reference", "extractor", "extractor_weights", "num_samples")


@dataclass(frozen=True)
class CellResult:
    """Status and results of one cell.

    Args:
        name: name of the cell's folder.
        axes: value on each axis; these identify the variant.
        seed: seed of training and sampling.
        status: state of the cell.
        commands: command lines, each runnable by hand after `lightning-mvar`.
        tries: number of attempts started.
        seconds: total duration of the attempts that have ended.
        measures: if finished, final values by TensorBoard tag or by the key in scores.json and costs.json; the
            training rate is the median over the run, in images per second. Scores are means over the sampling seeds;
            sampling costs that `evaluate` counted replace those of costs.json.
        draws: if finished, the scores of each sampling seed; empty for a sweep without `sampling_seeds`.
        curves: if finished, the curves of LOSSES, TRAINING_SCORES and each scale's validation loss.
        tokenizer: if trained and finished, the tokenizer of the tokens; losses are comparable only for the same one.
        conditions: if finished and evaluated, the evaluation conditions of its scores.
    """

    name: str
    axes: Axes
    seed: int
    status: State
    commands: list[str] = field(default_factory=list)
    tries: int = 0
    seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    draws: dict[int, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    tokenizer: str = ""
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def variant(self) -> str:
        return self.name.removesuffix(f"-seed{self.seed}")


@dataclass(frozen=True)
class Sweep:
    """All cells in the order of the sweep file, including those without a folder yet, and that file and its text."""

    folder: Path
    plan: SweepFile
    text: str
    cells: list[CellResult]

    @property
    def axes(self) -> dict[str, list[str]]:
        """Returns the names of the values on each axis."""
        return {axis: [choice.name for choice in choices] for axis, choices in self.plan.axes.items()}

    @cached_property
    def finished(self) -> list[CellResult]:
        return [cell for cell in self.cells if cell.finished]

    @property
    def unfinished(self) -> list[CellResult]:
        return [cell for cell in self.cells if not cell.finished]


def read_results(folder: str | Path) -> Sweep:
    """Reads a sweep's folder.

    Raises:
        InputError: if the folder is not a sweep's, or a file in it is damaged or missing.
    """
    folder = Path(folder)
    file = folder / "sweep.yaml"
    if not file.is_file():
        raise InputError(f"{folder} is not the folder of a sweep: it has no sweep.yaml")
    plan = read_sweep(file)
    started = [Cell.read(path) for path in sorted((folder / "cells").glob("*")) if path.is_dir()]
    plan.check_cells(started)
    variants, names = plan.variants(), [cell.name for cell in started]
    order = [variant.axes for variant in variants]
    planned = [plan.cell(variant, seed, folder) for variant, seed in product(variants, plan.seeds)]
    cells = [read_cell(cell, plan) for cell in started]
    cells += [CellResult(cell.name, cell.axes, cell.seed, "waiting") for cell in planned if cell.name not in names]
    cells.sort(key=lambda cell: (order.index(cell.axes), cell.seed))
    return Sweep(folder, plan, file.read_text(), cells)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_cell(cell: Cell, plan: SweepFile) -> CellResult:
    """Reads a cell's folder; its results only if it has finished."""
    folder, history = cell.folder, attempts(cell.folder)
    result = CellResult(
        cell.name,
        cell.axes,
        cell.seed,
        cell.state_after(history),
        list(cell.commands),
        tries=len(history),
        seconds=sum(attempt.seconds or 0.0 for attempt in history),
    )
    if not result.finished:
        return result
    files = [folder / score_files(seed)[1] for seed in plan.sampling_seeds or (None,)]
    scored = [read_scores(file) for file in files if plan.sampling_seeds or file.exists()] or [({}, {})]
    draws = [scores for scores, _ in scored]
    names = [name for name in draws[0] if all(name in scores for scores in draws)]
    measures = {name: fmean(scores[name] for scores in draws) for name in names}
    result = replace(
        result, measures=measures, draws=dict(zip(plan.sampling_seeds, draws, strict=False)), conditions=scored[0][1]
    )
    if plan.fit is None:
        return result
    curves, rate, tokenizer = read_logs(folder / "logs")
    last = {tag: curve[-1][1] for tag, curve in curves.items()}
    costs_file = folder / "costs.json"
    costs = parse_numbers(costs_file, read_record(costs_file, dict[str, Scalar], REWRITE), Costs._fields)
    return replace(result, measures=last | rate | costs | measures, curves=curves, tokenizer=tokenizer)


def read_logs(logs: Path) -> tuple[dict[str, Curve], dict[str, float], str]:
    """Reads the curves, the training rate and the tokenizer of the cell's fit from TensorBoard's event files."""
    files = [path for path in logs.glob("*") if "tfevents" in path.name]  # those that TensorBoard reads
    if not files:
        raise InputError(f"{logs} has no TensorBoard events: remove the cell's folder and start the sweep again")
    for path in files:
        check_records(path)
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0, "tensors": 1, "images": 1, "histograms": 1})
    try:
        events.Reload()
        row = read_row(events)
        batch, tokenizer = checked(row["global_batch"], float, "global_batch"), str(row["tokenizer"])
    except KeyError as error:
        raise InputError(f"{logs} has no hyperparameter {error}: it was not written by `lightning-mvar fit`") from error
    except (DecodeError, InputError) as error:
        raise InputError(f"{logs} is damaged ({one_line(error)}): remove the cell's folder to run it again") from error
    if not 1 <= batch <= MAX_BATCH:
        raise InputError(f"{logs} is damaged: global_batch is {batch:g}; remove the cell's folder to run it again")
    tags = [tag for tag in events.Tags()["scalars"] if tag in (*LOSSES, *TRAINING_SCORES) or tag.startswith(SCALE_LOSS)]
    if unknown := [tag for tag in tags if tag.startswith(SCALE_LOSS) and not SCALE_TAG.fullmatch(tag)]:
        raise InputError(f"{logs} is damaged: {shown(unknown[0])} names no scale; remove the cell's folder")
    curves = {tag: [((step + 1) * int(batch), value) for step, value in curve_points(events, tag)] for tag in tags}
    if "val/loss" not in curves:
        raise InputError(f"{logs} has no val/loss: the sweep's fit must validate (--trainer.val_check_interval)")
    has_rate = TRAINING_RATE in events.Tags()["scalars"]
    rates = [value for _, value in curve_points(events, TRAINING_RATE)] if has_rate else []
    return curves, {TRAINING_RATE: median(rates)} if rates else {}, tokenizer


def check_records(path: Path) -> None:
    """Checks the CRCs of an event file: TensorBoard silently stops at a damaged record, and reports an earlier loss.

    A half-written last record, left by a run that was killed, is no damage.
    """
    with open_regular(path) as file:
        while len(header := file.read(12)) == 12:
            length, header_crc = struct.unpack("<QI", header)
            intact = masked_crc32c(header[:8]) == header_crc and length <= MAX_RECORD_BYTES
            record = file.read(length + 4) if intact else b""
            if intact and len(record) < length + 4:
                return
            if not intact or masked_crc32c(record[:-4]) != int.from_bytes(record[-4:], "little"):
                raise InputError(f"{path} is damaged: a checksum differs; remove the cell's folder to run it again")


def curve_points(events: EventAccumulator, tag: str) -> Curve:
    """Returns (step, value) pairs, steps counted from 0; if attempts overlap, the last value of a step wins."""
    return sorted({event.step: event.value for event in events.Scalars(tag)}.items())


def read_scores(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Reads the scores and sampling costs that `evaluate` wrote, and their conditions."""
    records = read_record(path, list[dict[str, Scalar]], REWRITE)
    if len(records) != 1:
        raise InputError(f"{path} is damaged: it must be a list of one record; {REWRITE}")
    (record,) = records
    scores = parse_numbers(path, record, [key for key in (*SCORES, *RATES, *COSTS) if key in record])
    return scores, {key: record[key] for key in CONDITIONS if key in record}


def parse_numbers(path: Path, record: dict[str, Scalar], keys: Iterable[str]) -> dict[str, float]:
    """Returns numbers of a record; those beyond float32 are refused, because their statistics would overflow."""
    try:
        numbers = {key: checked(record[key], float, key) for key in keys}
        for key, number in numbers.items():
            if abs(number) > MAX_NUMBER:
                raise InputError(f"{key} is {number}, beyond float32")
        return numbers
    except KeyError as error:
        raise InputError(f"{path} is damaged (KeyError: {error}): {REWRITE}") from error
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}): {REWRITE}") from error
