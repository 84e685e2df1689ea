"""`sweep`: runs `fit` and `evaluate`, or other commands, for every cell of a sweep file."""

from __future__ import annotations

import argparse
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning_mvar.cli import COMMANDS
from lightning_mvar.cli.arguments import check
from lightning_mvar.cli.configs import find_and_report_config
from lightning_mvar.cli.training import parse_command
from lightning_mvar.commands.evaluate import evaluate
from lightning_mvar.errors import InputError, Interrupted, require_in
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.json_files import checked
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.models.config import TOKEN_FIELDS, MVARConfig
from lightning_mvar.models.costs import match_budget
from lightning_mvar.sweeps.cells import Cell
from lightning_mvar.sweeps.launchers import Launcher, local_launcher, ray_launcher, submitit_launcher
from lightning_mvar.sweeps.plan import GridPoint, SweepFile
from lightning_mvar.sweeps.preparation import prepare
from lightning_mvar.sweeps.processes import Stop
from lightning_mvar.sweeps.status import status_table
from lightning_mvar.sweeps.sweep_file import read_sweep

REFRESH_S = 1.0


def sweep(
    file: str,
    out: str | None = None,
    jobs: int = 1,
    launcher: Literal["local", "submitit", "ray"] = "local",
    submitit: dict[str, Any] | None = None,
    ray: dict[str, float] | None = None,
    dry_run: bool = False,
) -> None:
    """Runs the cells of a sweep file, each a list of ordinary commands; run it again to resume.

    Finished cells are skipped, interrupted ones resume, crashed ones are retried once. Ctrl-C saves the running cells.
    docs/sweeps.md describes the format of the file.

    Args:
        file: sweep file, such as configs/sweep/digits_quick.yaml.
        out: folder of the sweep, by default outputs/sweep/NAME for NAME.yaml.
        jobs: number of cells to run at once.
        launcher: where cells run: `local` on this machine, `submitit` as Slurm jobs, `ray` on a Ray cluster.
        submitit: executor parameters for --launcher submitit: --submitit.cluster slurm or local,
            --submitit.timeout_min 600, --submitit.gpus_per_node 1, --submitit.slurm_partition NAME.
        ray: resources per cell for --launcher ray: --ray.cpu 4 --ray.gpu 1.
        dry_run: print the commands of the preparation and of every cell, and run nothing.
    """
    path = Path(find_and_report_config(file))
    plan = read_sweep(path)
    folder = Path("outputs/sweep") / path.stem if out is None else Path(out)
    cells = plan_cells(plan, folder)
    preparation = plan.preparation()
    if dry_run:
        check_folder(plan, folder, cells)
        if preparation:
            print("prepare:", *(f"  lightning-mvar {shlex.join(args)}" for _, args in preparation), sep="\n")
        for cell in cells:
            print(f"{cell.name}:", *(f"  lightning-mvar {command}" for command in cell.commands), sep="\n")
        return
    launch = choose_launcher(launcher, jobs, folder, submitit, ray)
    with lock_folder(folder, "sweep") as lock, handle_stop_signals() as stop:
        check_folder(plan, folder, cells)
        for cell in cells:
            cell.record()
        with atomic_path(folder / "sweep.yaml") as copy:
            copy.write_text(path.read_text())
        begin, finished_before = time.monotonic(), [cell for cell in cells if cell.state() == "finished"]
        if len(finished_before) < len(cells):
            prepare(preparation, folder, stop, lock)
            with status_table(cells) as refresh:
                run_cells(cells, launch, stop, refresh)
        if stop.signal:
            name, remedy = signal.Signals(stop.signal).name, "run the same command again to continue"
            raise Interrupted(stop.signal, f"interrupted by {name}; {count_states(cells)}", remedy)
        seconds = time.monotonic() - begin
        print(f"{count_states(cells)}, {len(finished_before)} earlier; {seconds:.0f} s, in {folder}", flush=True)
        if unfinished := [(cell, state) for cell in cells if (state := cell.state()) != "finished"]:
            names = "; ".join(f"{cell.name} {state}, see {cell.log}" for cell, state in unfinished)
            counts = f"{len(unfinished)} of {len(cells)}"
            raise InputError(f"{counts} cells have not finished: {names}; run the same command again to retry")


def check_folder(plan: SweepFile, folder: Path, cells: list[Cell]) -> None:
    """Raises InputError if a sweep's folder has cells of another sweep, or cells that were run with other commands."""
    plan.check_cells(Cell.read(file.parent) for file in sorted((folder / "cells").glob("*/cell.json")))
    for cell in cells:
        cell.check()


def choose_launcher(
    name: str, jobs: int, folder: Path, submitit: dict[str, Any] | None, ray: dict[str, float] | None
) -> Launcher:
    require_in("[1, inf)", "--", jobs=jobs)
    for other, options in (("submitit", submitit), ("ray", ray)):
        if options is not None and name != other:
            raise InputError(f"--{other} is for --launcher {other}, not {name}")
    if name == "submitit":
        return submitit_launcher(jobs, folder / "submitit", submitit or {})
    if name == "ray":
        return ray_launcher(jobs, folder / "ray", ray or {"cpu": 1})
    return local_launcher(jobs)


def plan_cells(plan: SweepFile, folder: Path) -> list[Cell]:
    """Returns all cells of a sweep, after checking that their command lines parse.

    Raises:
        InputError: if a command line does not parse; the message names its cell.
    """
    plan.check_overlays()
    for key, commands in (("prepare", plan.prepare), ("run", plan.run)):
        for args in commands:
            if not args or args[0] not in COMMANDS:
                raise InputError(
                    f"{plan.path}: `{key}` has {' '.join(args)!r}, which is not a command; "
                    f"the commands are {', '.join(COMMANDS)}"
                )
    cells = []
    for variant in plan.variants():
        budget = check_variant(plan, variant, folder)
        cells += [plan.cell(variant, seed, folder, budget) for seed in plan.seeds]
    return cells


def check_variant(plan: SweepFile, variant: GridPoint, folder: Path) -> tuple[str, ...]:
    """Parses a variant's command lines and returns the arguments that make its network match the budget."""
    cell = plan.cell(variant, plan.seeds[0], folder)
    try:
        commands = cell.argument_lists()
        for args in commands[: len(commands) - len(plan.sampling_seeds[1:])]:  # the rest differ only in the seed
            if args[0] == "fit":
                namespace = parse_command(args)
            elif args[0] == "evaluate":
                check(evaluate, args)
        if plan.budget is None:
            return ()
        options = namespace.model.network.as_dict()
        if missing := [name for name in TOKEN_FIELDS if options[name] is None]:
            raise InputError(
                f"a budget needs network.{missing[0]}, which is not known before the tokenizer or the shards are read: "
                f"add --model.network.{missing[0]} to `fit`"
            )
        given = {name: value for name, value in options.items() if value is not None}
        network = checked(given, MVARConfig, str(plan.path))
        fitted = match_budget(network, plan.budget.by, parameters=plan.budget.parameters, flops=plan.budget.flops)
    except (argparse.ArgumentError, InputError) as error:
        raise InputError(f"{plan.path}: cell {cell.name}: {' '.join(str(error).split())}") from error
    changed = [field.name for field in fields(network) if getattr(network, field.name) != getattr(fitted, field.name)]
    names = dict.fromkeys([plan.budget.by, *changed])
    return tuple(arg for name in names for arg in (f"--model.network.{name}", str(getattr(fitted, name))))


def run_cells(cells: list[Cell], launch: Launcher, stop: Stop, refresh: Callable[[], None]) -> None:
    """Runs all cells that have not finished, then retries crashed ones once."""
    todo = [cell for cell in cells if cell.state() != "finished"]
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(launch, [cell.folder for cell in todo], stop)
            try:
                while not pending.done():
                    refresh()
                    wait([pending], REFRESH_S)
            except BaseException:
                stop.signal = signal.SIGTERM  # otherwise leaving the pool would wait for all cells
                raise
            pending.result()
        todo = [cell for cell in todo if cell.state() == "crashed"]
        if stop.signal or not todo:
            break
    while any(cell.state() == "running" for cell in cells):  # a launcher may return while a cell saves its state
        refresh()
        time.sleep(REFRESH_S)


def count_states(cells: list[Cell]) -> str:
    """Summarizes how many cells are in each state."""
    states = [cell.state() for cell in cells]
    others = [f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "finished"]
    return ", ".join([f"{states.count('finished')} of {len(cells)} cells finished", *others])


@contextmanager
def handle_stop_signals() -> Iterator[Stop]:
    """Turns SIGINT, SIGTERM and SIGHUP into a `Stop`, so that all work ends in order; restores the handlers."""
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        stop.signal = stop.signal or number

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
