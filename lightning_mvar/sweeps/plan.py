"""The file that `lightning-mvar sweep` takes, read and checked: a grid of variants, each with some seeds."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from lightning_mvar.errors import InputError
from lightning_mvar.sweeps.cells import Cell

By = Literal["width", "depth"]

# What the sweep itself says on the command lines.
OWN_FIT = ("--seed_everything", "--trainer.default_root_dir", "--resume", "--ckpt_path")
OWN_EVALUATE = ("--ckpt_path", "--samples", "--json", "--seed")
COLUMNS = ("cell", "variant", "status", "tries", "seconds")  # of a report's tables
CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Choice:
    """A value of an axis.

    Args:
        name: by which `cells` and records name it.
        label: its part of a cell's name.
        words: what it adds to the command line of fit.
    """

    name: str
    label: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """What all variants are made to match by choosing their width or depth: parameters, or FLOPs of a training image.

    One of the two is given.
    """

    by: By
    parameters: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class GridPoint:
    """A point of the grid, which its seeds share.

    Args:
        name: of its values.
        axes: name of the value on each axis.
        words: of its fit, without those of a budget, the seed and the folder.
    """

    name: str
    axes: dict[str, str]
    words: tuple[str, ...]


@dataclass(frozen=True)
class SweepFile:
    """A checked sweep file.

    Args:
        path: of the file.
        fit: words that every fit begins with.
        prepare: the words of commands that run before all cells.
        evaluate: words of every evaluate; None for none.
        axes: the values of each axis, by its name.
        listed: of each listed cell, the value on each axis; empty for the whole grid.
        seeds: of every variant.
        budget: what all variants match.
    """

    path: Path
    fit: tuple[str, ...]
    prepare: tuple[tuple[str, ...], ...]
    evaluate: tuple[str, ...] | None
    axes: dict[str, tuple[Choice, ...]]
    listed: tuple[dict[str, str], ...]
    seeds: tuple[int, ...]
    budget: Budget | None

    def variants(self) -> list[GridPoint]:
        """All points of the grid, or those that are listed, in order."""
        found = [self.variant(values) for values in self.listed or self.grid()]
        names = [variant.name for variant in found]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{self.path}: two cells would be named {twice[0]}: list each once, with distinct names")
        return found

    def check_overlays(self) -> None:
        """Raise InputError unless the YAML files that axes name are here."""
        for axis, choices in self.axes.items():
            words = [word for choice in choices for word in choice.words if word.endswith(CONFIG_SUFFIXES)]
            if missing := [word for word in words if not Path(word).is_file()]:
                raise InputError(f"{self.path}: axis {axis} names {missing[0]}, which is not here ({Path.cwd()})")

    def grid(self) -> Iterator[dict[str, str]]:
        for values in product(*self.axes.values()):
            yield {axis: value.name for axis, value in zip(self.axes, values, strict=True)}

    def variant(self, values: dict[str, str]) -> GridPoint:
        chosen = [next(c for c in choices if c.name == values[axis]) for axis, choices in self.axes.items()]
        words = [*self.fit, *(word for choice in chosen for word in choice.words)]
        axes = {axis: choice.name for axis, choice in zip(self.axes, chosen, strict=True)}
        return GridPoint("-".join(choice.label for choice in chosen) or "fit", axes, tuple(words))

    def cell(self, variant: GridPoint, seed: int, out: Path, budget: tuple[str, ...] = ()) -> Cell:
        """The run of a variant and a seed, whose fit has the words of the budget after the variant's."""
        folder = out / "cells" / f"{variant.name}-seed{seed}"
        own = ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), "--resume"]
        commands = [["fit", *variant.words, *budget, *own]]
        if self.evaluate is not None:
            files = ["--samples", str(folder / "samples.npz"), "--json", str(folder / "scores.json")]
            checkpoint = str(folder / "checkpoints/last.ckpt")
            commands.append(["evaluate", "--ckpt_path", checkpoint, *files, "--seed", str(seed), *self.evaluate])
        return Cell(folder, variant.axes, seed, tuple(shlex.join(words) for words in commands))


def read_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Raises:
        InputError: if it cannot be read, or says something that makes no sense.
    """
    content = read_mapping(path)
    known = [field.name for field in fields(SweepFile) if field.name not in ("path", "listed")] + ["cells"]
    if unknown := [key for key in content if key not in known]:
        raise InputError(f"{path}: there is no {unknown[0]!r} in a sweep; there are {', '.join(known)}")
    if "fit" not in content:
        raise InputError(f"{path}: it needs `fit`, the words that every cell's fit begins with")
    fit = words_of(path, "fit", content["fit"], OWN_FIT)
    evaluate = None if content.get("evaluate") is None else content["evaluate"]
    axes = read_axes(path, content.get("axes") or {})
    prepare = content.get("prepare") or []
    if not isinstance(prepare, list):
        raise InputError(f"{path}: `prepare` must be a list of commands")
    return SweepFile(
        path=path,
        fit=fit,
        prepare=tuple(words_of(path, "prepare", command) for command in prepare),
        evaluate=None if evaluate is None else words_of(path, "evaluate", evaluate, OWN_EVALUATE),
        axes=axes,
        listed=tuple(read_cells(path, axes, content["cells"])) if content.get("cells") is not None else (),
        seeds=read_seeds(path, content.get("seeds", [0])),
        budget=None if content.get("budget") is None else read_budget(path, content["budget"]),
    )


def read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): name a sweep file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a sweep file: it has no keys such as fit, axes, seeds")
    return content


def words_of(path: Path, key: str, text: object, own: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A command line's words, without the options that the sweep gives itself."""
    if not isinstance(text, str):
        raise InputError(f"{path}: `{key}` must be words of a command line, got {text!r}")
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"{path}: `{key}`: {error} in {text!r}") from error
    if taken := [word for word in words if word.split("=")[0] in own]:
        raise InputError(f"{path}: `{key}` has {taken[0]}, which the sweep gives each cell itself: leave it out")
    return words


def read_axes(path: Path, axes: object) -> dict[str, tuple[Choice, ...]]:
    if not isinstance(axes, dict):
        raise InputError(f"{path}: `axes` must map each axis to its values")
    found: dict[str, tuple[Choice, ...]] = {}
    for key, values in axes.items():
        axis = str(key).rsplit(".", 1)[-1]
        if axis in found:
            raise InputError(f"{path}: two axes are named {axis}")
        if axis in COLUMNS:
            raise InputError(f"{path}: an axis cannot be named {axis}: tables have a column of that name")
        if axis in ("seed", "seeds") or f"--{key}" in OWN_FIT:
            raise InputError(f"{path}: {key} is no axis: the sweep gives it each cell itself (see `seeds`)")
        if not isinstance(values, list | dict) or not values:
            raise InputError(f"{path}: axis {key} needs a list of values, or a map of names to words of fit")
        found[axis] = named_pieces(path, key, values) if isinstance(values, dict) else listed(path, key, axis, values)
        names = [choice.name for choice in found[axis]]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path}: axis {key} has two values named {twice[0]}")
    return found


def named_pieces(path: Path, key: str, values: dict[Any, Any]) -> tuple[Choice, ...]:
    return tuple(
        Choice(str(name), in_a_name(str(name)), words_of(path, f"{key}.{name}", text or "", OWN_FIT))
        for name, text in values.items()
    )


def listed(path: Path, key: str, axis: str, values: list[Any]) -> tuple[Choice, ...]:
    """Overlays where all values are YAML files, else values of the option `key`."""
    overlays = [isinstance(value, str) and value.endswith(CONFIG_SUFFIXES) for value in values]
    if any(overlays) and not all(overlays):
        raise InputError(f"{path}: axis {key} has YAML files and other values: give named words for such an axis")
    if not any(overlays):
        return tuple(
            Choice(str(value), f"{axis}{in_a_name(str(value))}", (f"--{key}", as_word(value))) for value in values
        )
    return tuple(Choice(Path(value).stem, in_a_name(Path(value).stem), ("--config", value)) for value in values)


def as_word(value: object) -> str:
    """As the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def in_a_name(text: str) -> str:
    """As part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_.")


def read_cells(path: Path, axes: dict[str, tuple[Choice, ...]], cells: object) -> Iterator[dict[str, str]]:
    """The listed cells, each value a name; lists of values stand for their product."""
    if not isinstance(cells, list) or not cells:
        raise InputError(f"{path}: `cells` must list maps of axes to values; leave it out for the whole grid")
    for cell in cells:
        if not isinstance(cell, dict):
            raise InputError(f"{path}: `cells` has {cell!r}, which is no map of axes to values")
        given = {
            str(key).rsplit(".", 1)[-1]: value if isinstance(value, list) else [value] for key, value in cell.items()
        }
        if unknown := [axis for axis in given if axis not in axes]:
            raise InputError(
                f"{path}: the cell {cell} has no axis to go with {unknown[0]!r}; there are {', '.join(axes)}"
            )
        if missing := [axis for axis in axes if not given.get(axis)]:
            raise InputError(f"{path}: the cell {cell} does not say its {missing[0]}")
        for axis, values in given.items():
            names = [choice.name for choice in axes[axis]]
            if unknown := [value for value in values if str(value) not in names]:
                raise InputError(f"{path}: axis {axis} has no value {str(unknown[0])!r}; there are {', '.join(names)}")
        for point in product(*(given[axis] for axis in axes)):
            yield {axis: str(value) for axis, value in zip(axes, point, strict=True)}


def read_seeds(path: Path, seeds: object) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"{path}: `seeds` must be a list of numbers from 0 on, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: `seeds` names one twice: {seeds}")
    return tuple(seeds)


def read_budget(path: Path, budget: object) -> Budget:
    wanted = "`budget` must be {parameters: NUMBER, by: width}, with flops for parameters or depth for width"
    if not isinstance(budget, dict) or len(budget) != 2 or budget.get("by") not in get_args(By):
        raise InputError(f"{path}: {wanted}, got {budget!r}")
    (kind,) = (key for key in budget if key != "by")
    amount = budget[kind]
    if kind not in ("parameters", "flops") or isinstance(amount, bool) or not isinstance(amount, int | float | str):
        raise InputError(f"{path}: {wanted}, got {budget!r}")
    try:
        number = int(float(amount))  # YAML takes 5e5 for a word
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise InputError(f"{path}: `budget` needs a number of {kind} from 1 on, got {amount!r}")
    return Budget(cast(By, budget["by"]), **{kind: number})
