"""Reads the sweep file of `lightning-mvar sweep`; every mistake is an error that names the file."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from lightning_mvar.errors import InputError
from lightning_mvar.io.configs import YAML_ERRORS, compose, yaml_problem
from lightning_mvar.io.files import read_regular
from lightning_mvar.io.json_files import shown
from lightning_mvar.sweeps.measures import TITLES
from lightning_mvar.sweeps.plan import CONFIG_SUFFIXES, FIT_OPTIONS, Budget, BudgetDimension, Choice, SweepFile

# Options that the sweep itself sets on the command lines.
RESERVED_FIT_OPTIONS = (*FIT_OPTIONS[::2], "--ckpt_path")
RESERVED_EVALUATE_OPTIONS = ("--samples", "--json", "--seed")
# Columns of a report's tables, which cannot be names of axes.
REPORT_COLUMNS = {"cell", "variant", "missing_seeds", "sampling_seed", "status", "tries", "attempts_s", *TITLES}
MAX_BYTES = 2**20  # of a sweep file
MAX_CELLS = 10_000


def read_sweep(path: Path) -> SweepFile:
    """Reads and checks a sweep file; raises InputError if the file cannot be read or its content is invalid."""
    content = read_mapping(path)
    known = [field.name for field in fields(SweepFile) if field.name not in ("path", "listed_cells")] + ["cells"]
    if unknown := [key for key in content if key not in known]:
        raise InputError(f"{path}: a sweep file has no key {unknown[0]!r}; its keys are {', '.join(known)}")
    fit, evaluate = content.get("fit"), content.get("evaluate")
    axes = read_axes(path, content.get("axes") or {})
    seeds = read_seeds(path, "seeds", content.get("seeds", [0]))
    sampling_seeds, listed = content.get("sampling_seeds"), content.get("cells")
    check_cell_count(path, len(seeds) * (prod(map(len, axes.values())) if listed is None else 1))
    return SweepFile(
        path=path,
        fit=None if fit is None else split_arguments(path, "fit", fit, RESERVED_FIT_OPTIONS),
        prepare=read_commands(path, "prepare", content.get("prepare")),
        run=read_commands(path, "run", content.get("run")),
        evaluate=None if evaluate is None else split_arguments(path, "evaluate", evaluate, RESERVED_EVALUATE_OPTIONS),
        axes=axes,
        listed_cells=() if listed is None else tuple(read_listed_cells(path, axes, listed, len(seeds))),
        seeds=seeds,
        sampling_seeds=() if sampling_seeds is None else read_seeds(path, "sampling_seeds", sampling_seeds),
        baseline=None if content.get("baseline") is None else str(content["baseline"]),
        compare=read_measures(path, content.get("compare") or []),
        budget=None if content.get("budget") is None else read_budget(path, content["budget"]),
    )


def read_mapping(path: Path) -> dict[str, Any]:
    try:
        data = read_regular(path, MAX_BYTES)
    except InputError as error:
        raise InputError(f"cannot read {path} ({error}): name a sweep file") from error
    try:
        text = data.decode()
        compose(text)
        content = yaml.safe_load(text)
        str(content)  # fails for integers of more than 4,300 digits
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply, or an alias refers to itself") from error
    except YAML_ERRORS as error:
        raise InputError(f"{path} is not valid YAML: {yaml_problem(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a sweep file: it has no keys such as fit, axes, seeds")
    return content


def split_arguments(path: Path, key: str, text: object, reserved: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Splits a command line into arguments and refuses the options that the sweep itself sets."""
    if not isinstance(text, str):
        raise InputError(f"{path}: `{key}` must be a command line as text, got {shown(text)}")
    try:
        args = tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"{path}: `{key}`: {error} in {shown(text)}") from error
    if clashes := [arg for arg in args if arg.split("=")[0] in reserved]:
        raise InputError(f"{path}: `{key}` has {clashes[0]}, which the sweep sets for each cell: leave it out")
    return args


def read_commands(path: Path, key: str, commands: object) -> tuple[tuple[str, ...], ...]:
    if commands is None:
        return ()
    if not isinstance(commands, list):
        raise InputError(f"{path}: `{key}` must be a list of commands")
    return tuple(split_arguments(path, key, command) for command in commands)


def read_axes(path: Path, axes: object) -> dict[str, tuple[Choice, ...]]:
    if not isinstance(axes, dict):
        raise InputError(f"{path}: `axes` must map each axis to its values")
    choices: dict[str, tuple[Choice, ...]] = {}
    for key, values in axes.items():
        axis = str(key).rsplit(".", 1)[-1]
        if axis in choices:
            raise InputError(f"{path}: two axes are named {axis}")
        if axis in REPORT_COLUMNS:
            raise InputError(
                f"{path}: an axis cannot be named {axis}, as a report has a column of that name: choose another name, "
                f"and map the name of each value to its arguments"
            )
        if axis in ("seed", "seeds", "out") or f"--{key}" in RESERVED_FIT_OPTIONS:
            raise InputError(f"{path}: {key} cannot be an axis: the sweep sets it for each cell (see `seeds`)")
        if not isinstance(values, list | dict) or not values:
            raise InputError(f"{path}: axis {key} needs a list of values, or a map from names to arguments")
        if isinstance(values, dict):
            named = {str(name): (f"{key}.{name}", "" if text is None else text) for name, text in values.items()}
            choices[axis] = tuple(
                Choice(name, as_label(name), split_arguments(path, *text, RESERVED_FIT_OPTIONS))
                for name, text in named.items()
            )
        else:
            choices[axis] = value_choices(path, key, axis, values)
        names = [choice.name for choice in choices[axis]]
        if duplicates := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"{path}: axis {key} has two values named {duplicates[0]}")
    return choices


def value_choices(path: Path, key: str, axis: str, values: list[Any]) -> tuple[Choice, ...]:
    """Returns config overlays if all values are YAML files, otherwise values of the option `key`."""
    overlays = [isinstance(value, str) and value.endswith(CONFIG_SUFFIXES) for value in values]
    if any(overlays) and not all(overlays):
        raise InputError(
            f"{path}: axis {key} has YAML files and other values: name each value and give its arguments instead"
        )
    if not any(overlays):
        return tuple(
            Choice(str(value), f"{axis}{as_label(str(value))}", (as_argument(value),), f"--{key}") for value in values
        )
    return tuple(Choice(Path(value).stem, as_label(Path(value).stem), (value,), "--config") for value in values)


def as_argument(value: object) -> str:
    """Formats a value for the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def as_label(text: str) -> str:
    """Turns text into a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_.")


def check_cell_count(path: Path, count: int) -> None:
    if count > MAX_CELLS:
        raise InputError(f"{path} describes at least {count} cells, more than {MAX_CELLS}: split it")


def read_listed_cells(
    path: Path, axes: dict[str, tuple[Choice, ...]], cells: object, seeds: int
) -> Iterator[dict[str, str]]:
    """Yields the cells listed under `cells`; a cell with lists of values expands to their product."""
    if not isinstance(cells, list) or not cells:
        raise InputError(f"{path}: `cells` must list maps of axes to values; leave it out for the complete grid")
    count = 0
    for cell in cells:
        if not isinstance(cell, dict):
            raise InputError(f"{path}: `cells` has {shown(cell)}, which is not a map of axes to values")
        given = {
            str(key).rsplit(".", 1)[-1]: value if isinstance(value, list) else [value] for key, value in cell.items()
        }
        if unknown := [axis for axis in given if axis not in axes]:
            raise InputError(
                f"{path}: the cell {shown(cell)} names {shown(unknown[0])}, which is not an axis; "
                f"the axes are {', '.join(axes)}"
            )
        if missing := [axis for axis in axes if not given.get(axis)]:
            raise InputError(f"{path}: the cell {shown(cell)} does not give its {missing[0]}")
        for axis, values in given.items():
            names = [choice.name for choice in axes[axis]]
            if unknown := [value for value in values if str(value) not in names]:
                raise InputError(
                    f"{path}: axis {axis} has no value {shown(str(unknown[0]))}; it has {', '.join(names)}"
                )
        count += seeds * prod(map(len, given.values()))
        check_cell_count(path, count)
        for point in product(*(given[axis] for axis in axes)):
            yield {axis: str(value) for axis, value in zip(axes, point, strict=True)}


def read_seeds(path: Path, key: str, seeds: object) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"{path}: `{key}` must be a list of integers of at least 0, got {shown(seeds)}")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: `{key}` names one twice: {shown(seeds)}")
    return tuple(seeds)


def read_measures(path: Path, measures: object) -> tuple[str, ...]:
    if not isinstance(measures, list):
        raise InputError(f"{path}: `compare` must be a list of measures, got {shown(measures)}")
    if unknown := [measure for measure in measures if measure not in TITLES]:
        raise InputError(f"{path}: `compare` has {shown(unknown[0])}; the measures are {', '.join(TITLES)}")
    return tuple(measures)


def read_budget(path: Path, budget: object) -> Budget:
    expected = "`budget` must be {parameters: NUMBER, by: width}, with flops for parameters or depth for width"
    if not isinstance(budget, dict) or len(budget) != 2 or budget.get("by") not in get_args(BudgetDimension):
        raise InputError(f"{path}: {expected}, got {shown(budget)}")
    (kind,) = (key for key in budget if key != "by")
    amount = budget[kind]
    if kind not in ("parameters", "flops") or isinstance(amount, bool) or not isinstance(amount, int | float | str):
        raise InputError(f"{path}: {expected}, got {shown(budget)}")
    try:
        number = int(float(amount))  # YAML reads 5e5 as a string
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise InputError(f"{path}: `budget` needs at least 1 as its number of {kind}, got {shown(amount)}")
    return Budget(cast(BudgetDimension, budget["by"]), **{kind: number})
