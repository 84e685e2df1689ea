"""The plan of a sweep: a grid of variants, each with several seeds, and the commands of each cell."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from lightning_mvar.errors import InputError
from lightning_mvar.io.configs import find_config
from lightning_mvar.io.json_files import shown
from lightning_mvar.sweeps.cells import Cell
from lightning_mvar.sweeps.templates import fill, placeholders

BudgetDimension = Literal["width", "depth"]

# Arguments that the sweep itself adds to the command lines of `fit` and `evaluate`.
FIT_OPTIONS = ("--seed_everything", "{seed}", "--trainer.default_root_dir", "{out}", "--resume")
CHECKPOINT_OF_FIT = ("--ckpt_path", "{out}/checkpoints/last.ckpt")
CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Choice:
    """A value of an axis.

    Args:
        name: name in `cells` and in records.
        label: its part of a cell's name.
        value: arguments that stand for the axis's placeholder.
        option: option of fit that has this value, for an axis without a placeholder; None if `value` has its own.
    """

    name: str
    label: str
    value: tuple[str, ...]
    option: str | None = None

    @property
    def args(self) -> tuple[str, ...]:
        """Returns the arguments that it adds to the command line of fit."""
        return self.value if self.option is None else (self.option, *self.value)


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
        args: arguments that axes without a placeholder add to fit.
        values: arguments that stand for the placeholder of each axis.
    """

    name: str
    axes: dict[str, str]
    args: tuple[str, ...]
    values: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class SweepFile:
    """A checked sweep file.

    Args:
        path: path of the file.
        fit: first arguments of every cell's fit; None if cells train nothing of their own.
        prepare: commands that run before all cells; one with `{seed}` runs once per seed.
        run: commands of every cell in order, with placeholders; empty if cells have `fit`, or are only evaluated.
        evaluate: arguments of every evaluate, with placeholders; None to skip evaluation.
        axes: the values of each axis, by the axis's name.
        listed_cells: for each cell listed under `cells`, the value on each axis; empty for the complete grid.
        seeds: seeds of every variant.
        sampling_seeds: seeds that every cell is evaluated with; empty for the cell's own seed.
        baseline: variant that a report compares the others with; None for the first.
        compare: measures that a report compares; empty for validation loss and Frechet distance.
        budget: size that all variants match; None if they need not.
    """

    path: Path
    fit: tuple[str, ...] | None
    prepare: tuple[tuple[str, ...], ...]
    run: tuple[tuple[str, ...], ...]
    evaluate: tuple[str, ...] | None
    axes: dict[str, tuple[Choice, ...]]
    listed_cells: tuple[dict[str, str], ...]
    seeds: tuple[int, ...]
    sampling_seeds: tuple[int, ...]
    baseline: str | None
    compare: tuple[str, ...]
    budget: Budget | None

    def __post_init__(self) -> None:
        if self.fit is not None and self.run:
            raise InputError(
                f"{self.path}: give either `fit`, the first arguments of every fit, or `run`, each cell's commands"
            )
        if self.fit is None and not self.run and self.evaluate is None:
            raise InputError(f"{self.path} gives cells nothing to do: add `fit`, `run` or `evaluate`")
        if self.fit is None and self.budget is not None:
            raise InputError(f"{self.path}: `budget` sets options of `fit`, and there is none: leave it out")
        if self.evaluate is None and self.sampling_seeds:
            raise InputError(f"{self.path}: `sampling_seeds` needs `evaluate`")
        if self.evaluate is not None:
            has_checkpoint = any(arg.split("=")[0] == "--ckpt_path" for arg in self.evaluate)
            if self.fit is not None and has_checkpoint:
                raise InputError(f"{self.path}: `evaluate` has --ckpt_path, which the sweep sets: leave it out")
            if self.fit is None and not has_checkpoint:
                raise InputError(f"{self.path}: `evaluate` needs --ckpt_path, such as {{out}}/x that `run` writes")
        self.check_placeholders()
        if self.baseline is not None and self.baseline not in (names := [point.name for point in self.variants()]):
            example = f"the `baseline`; {names[0]} is one"
            raise InputError(f"{self.path}: no variant is named {shown(self.baseline)}, {example}")

    def check_placeholders(self) -> None:
        """Raises InputError for a placeholder without a value, and for an axis that no command would use."""
        texts = {
            "prepare": (self.prepare, {"seed"}),
            "axes": ([choice.value for choices in self.axes.values() for choice in choices], {"seed", "out"}),
            "fit": ([self.fit or ()], {"seed", "out", *self.axes}),
            "run": (self.run, {"seed", "out", *self.axes}),
            "evaluate": ([self.evaluate or ()], {"seed", "out", *self.axes}),
        }
        for key, (commands, known) in texts.items():
            for name in (name for command in commands for name in placeholders(command)):
                if name not in known:
                    allowed = ", ".join(f"{{{other}}}" for other in sorted(known))
                    raise InputError(f"{self.path}: `{key}` has the placeholder {{{name}}}; it can have {allowed}")
        if self.fit is None and (unused := [axis for axis in self.axes if axis not in self.placed_axes]):
            remedy = f"write {{{unused[0]}}} in `run` or `evaluate`"
            raise InputError(f"{self.path}: axis {unused[0]} has no effect: {remedy}")

    @property
    def placed_axes(self) -> set[str]:
        """Returns the axes whose values fill placeholders, instead of adding arguments to fit."""
        return {
            name for command in (self.fit or (), *self.run, self.evaluate or ()) for name in placeholders(command)
        } & set(self.axes)

    def preparation(self) -> list[tuple[int | None, tuple[str, ...]]]:
        """Returns the commands that run before all cells in order, each with its seed; None if it serves all seeds."""
        commands: list[tuple[int | None, tuple[str, ...]]] = []
        for command in self.prepare:
            if "seed" in placeholders(command):
                commands += [(seed, fill(command, {"seed": (str(seed),)})) for seed in self.seeds]
            else:
                commands.append((None, command))
        return commands

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
            if missing := [file for file in files if not Path(find_config(file)).is_file()]:
                raise InputError(f"{self.path}: axis {axis} names {missing[0]}, which is not a file in {Path.cwd()}")

    def check_cells(self, cells: Iterable[Cell]) -> None:
        """Raises InputError if a cell in the sweep's folder has a seed, or values on the axes, that are not here."""
        known = [variant.axes for variant in self.variants()]
        for cell in cells:
            remedy = f"the sweep file, start the sweep with another --out, or move {cell.folder} away"
            if cell.axes not in known:
                raise InputError(
                    f"{cell.folder} has axes {cell.axes} that {self.path} does not have: add them to {remedy}"
                )
            if cell.seed not in self.seeds:
                raise InputError(
                    f"{cell.folder} has seed {cell.seed}, which {self.path} does not have: add it to {remedy}"
                )

    def grid(self) -> Iterator[dict[str, str]]:
        for values in product(*self.axes.values()):
            yield {axis: value.name for axis, value in zip(self.axes, values, strict=True)}

    def variant(self, names: dict[str, str]) -> GridPoint:
        chosen = {
            axis: next(choice for choice in choices if choice.name == names[axis])
            for axis, choices in self.axes.items()
        }
        added = [arg for axis, choice in chosen.items() if axis not in self.placed_axes for arg in choice.args]
        return GridPoint(
            name="-".join(choice.label for choice in chosen.values()) or ("run" if self.fit is None else "fit"),
            axes={axis: choice.name for axis, choice in chosen.items()},
            args=tuple(added),
            values={axis: choice.value for axis, choice in chosen.items()},
        )

    def cell(self, variant: GridPoint, seed: int, out: Path, budget: tuple[str, ...] = ()) -> Cell:
        """Returns the run of a variant with a seed; in its fit, the budget's arguments follow the variant's."""
        folder = out / "cells" / f"{variant.name}-seed{seed}"
        own = {"seed": (str(seed),), "out": (str(folder),)}
        values = {axis: fill(value, own) for axis, value in variant.values.items()} | own
        commands = [*self.run]
        if self.fit is not None:
            commands.append(("fit", *self.fit, *variant.args, *budget, *FIT_OPTIONS))
        if self.evaluate is not None:
            checkpoint = () if self.fit is None else CHECKPOINT_OF_FIT
            for sampling_seed in self.sampling_seeds or (None,):
                samples, scores = score_files(sampling_seed)
                files = ("--samples", f"{{out}}/{samples}", "--json", f"{{out}}/{scores}")
                seed_option = ("--seed", "{seed}" if sampling_seed is None else str(sampling_seed))
                commands.append(("evaluate", *checkpoint, *files, *seed_option, *self.evaluate))
        return Cell(folder, variant.axes, seed, tuple(shlex.join(fill(command, values)) for command in commands))


def score_files(sampling_seed: int | None) -> tuple[str, str]:
    """Returns the names of the samples and of the scores in a cell's folder; None for the cell's own seed."""
    suffix = "" if sampling_seed is None else f"-{sampling_seed}"
    return f"samples{suffix}.npz", f"scores{suffix}.json"
