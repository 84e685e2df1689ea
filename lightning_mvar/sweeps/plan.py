"""The sweep file of `lightning-mvar sweep`, read and checked: a grid of variants, each with several seeds."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from lightning_mvar.errors import InputError, one_line
from lightning_mvar.io.configs import YAML_ERRORS, compose
from lightning_mvar.io.files import read_regular
from lightning_mvar.io.json_files import shown
from lightning_mvar.sweeps.cells import Cell

BudgetDimension = Literal["width", "depth"]

# Options that the sweep itself sets on the command lines.
RESERVED_FIT_OPTIONS = ("--seed_everything", "--trainer.default_root_dir", "--resume", "--ckpt_path")
RESERVED_EVALUATE_OPTIONS = ("--ckpt_path", "--samples", "--json", "--seed")
REPORT_COLUMNS = ("cell", "variant", "status", "tries", "seconds")  # of a report's tables, so no axis names
MAX_BYTES = 2**20  # of a sweep file
MAX_CELLS = 10_000
CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Choice:
    """A value of an axis.

    Args:
        name: name in `cells` and in records.
        label: its part of a cell's name.
        args: arguments that it adds to the command line of fit.
    """

    name: str
    label: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """Size that all variants match by their choice of width or depth: parameters, or FLOPs per training image.

    Exactly one of the two is given.
    """

    by: BudgetDimension
    parameters: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class GridPoint:
    """A point of the grid, shared by its seeds.

    Args:
        name: labels of its values, joined.
        axes: name of the value on each axis.
        args: arguments of its fit, without those of the budget, the seed and the folder.
    """

    name: str
    axes: dict[str, str]
    args: tuple[str, ...]


@dataclass(frozen=True)
class SweepFile:
    """A checked sweep file.

    Args:
        path: path of the file.
        fit: first arguments of every fit.
        prepare: arguments of each command that runs before all cells.
        evaluate: arguments of every evaluate; None to skip evaluation.
        axes: the values of each axis, by the axis's name.
        listed_cells: for each cell listed under `cells`, the value on each axis; empty for the complete grid.
        seeds: seeds of every variant.
        budget: size that all variants match; None if they need not.
    """

    path: Path
    fit: tuple[str, ...]
    prepare: tuple[tuple[str, ...], ...]
    evaluate: tuple[str, ...] | None
    axes: dict[str, tuple[Choice, ...]]
    listed_cells: tuple[dict[str, str], ...]
    seeds: tuple[int, ...]
    budget: Budget | None

    def variants(self) -> list[GridPoint]:
        """Returns the points of the grid, or only those listed under `cells`, in order."""
        points = [self.variant(values) for values in self.listed_cells or self.grid()]
        names = [point.name for point in points]
        if duplicates := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(
                f"{self.path}: two cells would be named {duplicates[0]}: list each once, with distinct names"
            )
        return points

    def check_overlays(self) -> None:
        """Raises InputError unless all YAML files that the axes name exist."""
        for axis, choices in self.axes.items():
            files = [arg for choice in choices for arg in choice.args if arg.endswith(CONFIG_SUFFIXES)]
            if missing := [file for file in files if not Path(file).is_file()]:
                raise InputError(f"{self.path}: axis {axis} names {missing[0]}, which is not a file in {Path.cwd()}")

    def grid(self) -> Iterator[dict[str, str]]:
        for values in product(*self.axes.values()):
            yield {axis: value.name for axis, value in zip(self.axes, values, strict=True)}

    def variant(self, values: dict[str, str]) -> GridPoint:
        chosen = [next(c for c in choices if c.name == values[axis]) for axis, choices in self.axes.items()]
        args = [*self.fit, *(arg for choice in chosen for arg in choice.args)]
        axes = {axis: choice.name for axis, choice in zip(self.axes, chosen, strict=True)}
        return GridPoint("-".join(choice.label for choice in chosen) or "fit", axes, tuple(args))

    def cell(self, variant: GridPoint, seed: int, out: Path, budget: tuple[str, ...] = ()) -> Cell:
        """Returns the run of a variant with a seed; in its fit, the budget's arguments follow the variant's."""
        folder = out / "cells" / f"{variant.name}-seed{seed}"
        own = ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), "--resume"]
        commands = [["fit", *variant.args, *budget, *own]]
        if self.evaluate is not None:
            files = ["--samples", str(folder / "samples.npz"), "--json", str(folder / "scores.json")]
            checkpoint = str(folder / "checkpoints/last.ckpt")
            commands.append(["evaluate", "--ckpt_path", checkpoint, *files, "--seed", str(seed), *self.evaluate])
        return Cell(folder, variant.axes, seed, tuple(shlex.join(args) for args in commands))


def read_sweep(path: Path) -> SweepFile:
    """Reads and checks a sweep file.

    Raises:
        InputError: if the file cannot be read or its content is invalid.
    """
    content = read_mapping(path)
    known = [field.name for field in fields(SweepFile) if field.name not in ("path", "listed_cells")] + ["cells"]
    if unknown := [key for key in content if key not in known]:
        raise InputError(f"{path}: a sweep file has no key {unknown[0]!r}; its keys are {', '.join(known)}")
    if "fit" not in content:
        raise InputError(f"{path}: the key `fit` is missing: give the first arguments of every fit")
    fit = split_arguments(path, "fit", content["fit"], RESERVED_FIT_OPTIONS)
    evaluate = None if content.get("evaluate") is None else content["evaluate"]
    axes = read_axes(path, content.get("axes") or {})
    prepare = content.get("prepare") or []
    if not isinstance(prepare, list):
        raise InputError(f"{path}: `prepare` must be a list of commands")
    seeds = read_seeds(path, content.get("seeds", [0]))
    listed = content.get("cells")
    check_cell_count(path, len(seeds) * (prod(map(len, axes.values())) if listed is None else 1))
    return SweepFile(
        path=path,
        fit=fit,
        prepare=tuple(split_arguments(path, "prepare", command) for command in prepare),
        evaluate=None if evaluate is None else split_arguments(path, "evaluate", evaluate, RESERVED_EVALUATE_OPTIONS),
        axes=axes,
        listed_cells=() if listed is None else tuple(read_listed_cells(path, axes, listed, len(seeds))),
        seeds=seeds,
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
        raise InputError(f"{path} is not valid YAML: {one_line(error)}") from error
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


def read_axes(path: Path, axes: object) -> dict[str, tuple[Choice, ...]]:
    if not isinstance(axes, dict):
        raise InputError(f"{path}: `axes` must map each axis to its values")
    choices: dict[str, tuple[Choice, ...]] = {}
    for key, values in axes.items():
        axis = str(key).rsplit(".", 1)[-1]
        if axis in choices:
            raise InputError(f"{path}: two axes are named {axis}")
        if axis in REPORT_COLUMNS:
            raise InputError(f"{path}: an axis cannot be named {axis}: tables have a column of that name")
        if axis in ("seed", "seeds") or f"--{key}" in RESERVED_FIT_OPTIONS:
            raise InputError(f"{path}: {key} cannot be an axis: the sweep sets it for each cell (see `seeds`)")
        if not isinstance(values, list | dict) or not values:
            raise InputError(f"{path}: axis {key} needs a list of values, or a map from names to arguments of fit")
        if isinstance(values, dict):
            choices[axis] = named_choices(path, key, values)
        else:
            choices[axis] = value_choices(path, key, axis, values)
        names = [choice.name for choice in choices[axis]]
        if duplicates := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"{path}: axis {key} has two values named {duplicates[0]}")
    return choices


def named_choices(path: Path, key: str, values: dict[Any, Any]) -> tuple[Choice, ...]:
    return tuple(
        Choice(str(name), as_label(str(name)), split_arguments(path, f"{key}.{name}", text or "", RESERVED_FIT_OPTIONS))
        for name, text in values.items()
    )


def value_choices(path: Path, key: str, axis: str, values: list[Any]) -> tuple[Choice, ...]:
    """Returns config overlays if all values are YAML files, otherwise values of the option `key`."""
    overlays = [isinstance(value, str) and value.endswith(CONFIG_SUFFIXES) for value in values]
    if any(overlays) and not all(overlays):
        raise InputError(
            f"{path}: axis {key} has YAML files and other values: name each value and give its arguments instead"
        )
    if not any(overlays):
        return tuple(
            Choice(str(value), f"{axis}{as_label(str(value))}", (f"--{key}", as_argument(value))) for value in values
        )
    return tuple(Choice(Path(value).stem, as_label(Path(value).stem), ("--config", value)) for value in values)


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


def read_seeds(path: Path, seeds: object) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"{path}: `seeds` must be a list of integers of at least 0, got {shown(seeds)}")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: `seeds` names one twice: {shown(seeds)}")
    return tuple(seeds)


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
