"""Results of a sweep's cells, read from the sweep's folder.

A cell is one training run with one seed; a variant is a set of cells that differ only in the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mvar.errors import InputError, one_line
from lightning_mvar.io.hparams import read_row
from lightning_mvar.sweeps.cells import INTERRUPTED_CODES, attempts
from lightning_mvar.sweeps.plan import read_sweep

Axes = dict[str, str]  # axis -> name of the value
Curve = list[tuple[int, float]]  # images trained on, value

SCALE_LOSS = "val_scale_loss/"  # followed by the side length
TRAINING_RATE = "perf/images_per_s"
# Measures and their titles in tables.
LOSSES = {
    "val/loss": "validation loss",
    "val/loss_last_scale": "loss of the last scale",
    "train/loss": "training loss",
}
SCORES = {
    "frechet_distance": "Frechet distance",
    "spatial_frechet_distance": "sFID",
    "frechet_distance_over_floor": "distance over floor",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
    "classifier_accuracy_on_samples": "classifier accuracy on samples",
    "svm_accuracy_on_samples": "SVM accuracy on samples",
    "svm_accuracy_trained_on_samples": "accuracy of SVM trained on samples",
}
TRAINING_SCORES = {
    "val/fid": "Frechet distance in training",
    "val/is": "inception score in training",
    "val/precision": "precision in training",
    "val/recall": "recall in training",
}
COSTS = {
    "parameters": "parameters",
    "flops_per_training_image": "FLOPs per training image",
    "flops_per_sampled_image": "FLOPs per sampled image",
    "state_bytes_per_image": "state bytes per image",
}
RATES = {TRAINING_RATE: "training images/s", "images_per_s": "sampling images/s"}
TITLES = LOSSES | SCORES | TRAINING_SCORES | COSTS | RATES
# Evaluation conditions: scores are comparable only if all of these agree.
CONDITIONS = ("reference", "extractor", "extractor_weights", "num_samples")

FINISHED, CRASHED, INTERRUPTED = "finished", "crashed", "interrupted"
KILLED, WAITING = "killed or still running", "not begun"


@dataclass(frozen=True)
class CellResult:
    """Status and results of one cell.

    Args:
        name: name of the cell's folder.
        axes: value on each axis; these identify the variant.
        seed: seed of training and sampling.
        status: FINISHED, CRASHED, INTERRUPTED, KILLED or WAITING, after the last attempt.
        commands: command lines, each runnable by hand after `lightning-mvar`.
        tries: number of attempts started.
        seconds: total duration of the attempts that have ended.
        measures: if finished, final values by TensorBoard tag or by the key in scores.json and costs.json; the
            training rate is the median over the run, in images per second.
        curves: if finished, the curves of LOSSES, TRAINING_SCORES and each scale's validation loss.
        tokenizer: if finished, the tokenizer of the tokens; losses are comparable only for the same tokenizer.
        conditions: if finished and evaluated, the evaluation conditions of its scores.
    """

    name: str
    axes: Axes
    seed: int
    status: str
    commands: list[str] = field(default_factory=list)
    tries: int = 0
    seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    tokenizer: str = ""
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def variant(self) -> str:
        return self.name.removesuffix(f"-seed{self.seed}")


@dataclass(frozen=True)
class Sweep:
    """All cells in the order of the sweep file, including those without a folder yet, and the text of that file."""

    folder: Path
    text: str
    axes: dict[str, list[str]]
    seeds: list[int]
    cells: list[CellResult]

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
    variants = plan.variants()
    order = [variant.axes for variant in variants]
    cells = [read_cell(path) for path in sorted((folder / "cells").glob("*")) if path.is_dir()]
    for cell in cells:
        if cell.axes not in order:
            raise InputError(
                f"{folder}/cells/{cell.name}/cell.json has axes {cell.axes} that {file} does not have: add them to "
                f"the sweep file and start the sweep again, or move that folder away"
            )
    started = [cell.name for cell in cells]
    planned = [(plan.cell(variant, seed, folder), seed) for variant, seed in product(variants, plan.seeds)]
    cells += [CellResult(cell.name, cell.axes, seed, WAITING) for cell, seed in planned if cell.name not in started]
    cells.sort(key=lambda cell: (order.index(cell.axes), cell.seed))
    axes = {axis: [choice.name for choice in choices] for axis, choices in plan.axes.items()}
    return Sweep(folder, file.read_text(), axes, list(plan.seeds), cells)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_cell(folder: Path) -> CellResult:
    """Reads a cell's folder; its results only if it has finished."""
    definition = read_json(folder / "cell.json")
    try:
        axes = {str(axis): str(value) for axis, value in definition["axes"].items()}
        name, seed = str(definition["name"]), int(definition["seed"])
        commands = [str(line) for line in definition["commands"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged_error(folder / "cell.json", error) from error
    status, tries, seconds = summarize_attempts(folder)
    if status != FINISHED:
        return CellResult(name, axes, seed, status, commands, tries, seconds)
    curves, rate, tokenizer = read_logs(folder / "logs")
    last = {tag: curve[-1][1] for tag, curve in curves.items()}
    costs_file, scores_file = folder / "costs.json", folder / "scores.json"
    costs = parse_numbers(costs_file, check_flat(read_json(costs_file), costs_file), COSTS)
    scores = read_scores(scores_file)
    measures = (
        last | rate | costs | parse_numbers(scores_file, scores, [key for key in (*SCORES, *RATES) if key in scores])
    )
    conditions = {key: scores[key] for key in CONDITIONS if key in scores}
    return CellResult(name, axes, seed, status, commands, tries, seconds, measures, curves, tokenizer, conditions)


def summarize_attempts(folder: Path) -> tuple[str, int, float]:
    """Returns the status, the number of attempts started, and the total seconds of those that ended."""
    history = attempts(folder)
    if not history:
        return WAITING, 0, 0.0
    code = history[-1].code
    status = {None: KILLED, 0: FINISHED}.get(code, INTERRUPTED if code in INTERRUPTED_CODES else CRASHED)
    return status, len(history), sum(attempt.seconds or 0.0 for attempt in history)


def read_logs(logs: Path) -> tuple[dict[str, Curve], dict[str, float], str]:
    """Reads the curves, the training rate and the tokenizer of the cell's fit from TensorBoard's event files."""
    if not list(logs.glob("events.out.tfevents.*")):
        raise InputError(f"{logs} has no TensorBoard events: remove the cell's folder and start the sweep again")
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0, "tensors": 1, "images": 1, "histograms": 1})
    events.Reload()
    try:
        row = read_row(events)
        batch, tokenizer = int(row["global_batch"]), str(row["tokenizer"])
    except KeyError as error:
        raise InputError(f"{logs} has no hyperparameter {error}: it was not written by `lightning-mvar fit`") from error
    tags = [tag for tag in events.Tags()["scalars"] if tag in (*LOSSES, *TRAINING_SCORES) or tag.startswith(SCALE_LOSS)]
    curves = {tag: [((step + 1) * batch, value) for step, value in curve_points(events, tag)] for tag in tags}
    if "val/loss" not in curves:
        raise InputError(f"{logs} has no val/loss: the sweep's fit must validate (--trainer.val_check_interval)")
    has_rate = TRAINING_RATE in events.Tags()["scalars"]
    rates = [value for _, value in curve_points(events, TRAINING_RATE)] if has_rate else []
    return curves, {TRAINING_RATE: median(rates)} if rates else {}, tokenizer


def curve_points(events: EventAccumulator, tag: str) -> Curve:
    """Returns (step, value) pairs, steps counted from 0; if attempts overlap, the last value of a step wins."""
    return sorted({event.step: event.value for event in events.Scalars(tag)}.items())


def read_scores(path: Path) -> dict[str, Any]:
    """Reads the scores that `evaluate` wrote; empty if the sweep does not evaluate."""
    if not path.exists():
        return {}
    records = read_json(path)
    if not isinstance(records, list) or len(records) != 1:
        raise InputError(f"{path} is damaged: it must be a list of one record")
    return check_flat(records[0], path)


def check_flat(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or any(isinstance(value, dict | list) for value in content.values()):
        raise InputError(f"{path} is damaged: it must be a flat record")
    return content


def parse_numbers(path: Path, record: dict[str, Any], keys: Iterable[str]) -> dict[str, float]:
    try:
        return {key: float(record[key]) for key in keys}
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_error(path, error) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise damaged_error(path, error) from error


def damaged_error(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing: start the sweep again, or remove {path.parent}")
    reason = one_line(error)
    return InputError(f"{path} is damaged ({type(error).__name__}: {reason})")
