"""`sweep`: many runs of `fit` and `evaluate` from one file."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning_mvar.checkpoints.folders import config_from_dict
from lightning_mvar.cli import COMMANDS
from lightning_mvar.cli.arguments import call, check
from lightning_mvar.cli.training import parsed_fit
from lightning_mvar.commands.evaluate import evaluate
from lightning_mvar.errors import InputError, Interrupted
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.locks import alone_in
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.costs import matched
from lightning_mvar.sweeps.cells import Cell
from lightning_mvar.sweeps.launchers import Launcher, local_launcher, ray_launcher, submitit_launcher
from lightning_mvar.sweeps.plan import GridPoint, SweepFile, read_sweep
from lightning_mvar.sweeps.preparation import prepare
from lightning_mvar.sweeps.processes import Stop
from lightning_mvar.sweeps.table import status_table

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
    """Run the cells of a sweep file, each an ordinary `fit` and `evaluate`, and go on with them when started again.

    Finished cells are skipped, interrupted ones go on, crashed ones are tried once more. Ctrl-C saves what is running.
    docs/sweeps.md has the format of the file.

    Args:
        file: the sweep file, such as configs/sweep/digits_quick.yaml.
        out: folder of the sweep; outputs/sweep/NAME for NAME.yaml where not given.
        jobs: cells at once.
        launcher: where they run: `local`, on this machine; `submitit`, as jobs of Slurm; `ray`, on a Ray cluster.
        submitit: of the launcher submitit, parameters of its executor: --submitit.cluster slurm or local,
            --submitit.timeout_min 600, --submitit.gpus_per_node 1, --submitit.slurm_partition NAME.
        ray: of the launcher ray, what a cell needs: --ray.cpu 4 --ray.gpu 1.
        dry_run: print the commands of every cell and run nothing.
    """
    plan, path = read_sweep(Path(file)), Path(file)
    folder = Path("outputs/sweep") / path.stem if out is None else Path(out)
    cells = plan_cells(plan, folder)
    if dry_run:
        for cell in cells:
            print(f"{cell.name}:", *(f"  lightning-mvar {command}" for command in cell.commands), sep="\n")
        return
    launch = choose_launcher(launcher, jobs, folder, submitit, ray)
    with alone_in(folder, "sweep") as lock, stopping() as stop:
        for cell in cells:
            cell.check()
        for cell in cells:
            cell.record()
        with atomic_path(folder / "sweep.yaml") as copy:
            copy.write_text(path.read_text())
        begin, before = time.monotonic(), [cell for cell in cells if cell.state() == "finished"]
        if len(before) < len(cells):
            prepare(plan.prepare, folder, stop, lock)
            with status_table(cells) as show:
                run(cells, launch, stop, show)
        if stop.signal:
            name, remedy = signal.Signals(stop.signal).name, "the same command goes on with what is missing"
            raise Interrupted(stop.signal, f"interrupted by {name}; {count(cells)}", remedy)
        seconds = time.monotonic() - begin
        print(f"{count(cells)}, {len(before)} of them before; {seconds:.0f} s, in {folder}", flush=True)
        refuse_unfinished(cells)


def choose_launcher(
    name: str, jobs: int, folder: Path, submitit: dict[str, Any] | None, ray: dict[str, float] | None
) -> Launcher:
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    for other, options in (("submitit", submitit), ("ray", ray)):
        if options is not None and name != other:
            raise InputError(f"--{other} is for --launcher {other}, not {name}")
    if name == "submitit":
        return submitit_launcher(jobs, folder / "submitit", submitit or {})
    if name == "ray":
        return ray_launcher(jobs, folder / "ray", ray or {"cpu": 1})
    return local_launcher(jobs)


def plan_cells(plan: SweepFile, folder: Path) -> list[Cell]:
    """All cells, after their command lines have been parsed.

    Raises:
        InputError: naming the cell whose command line does not parse.
    """
    plan.check_overlays()
    for words in plan.prepare:
        if not words or words[0] not in COMMANDS:
            raise InputError(f"{plan.path}: `prepare` has {' '.join(words)!r}: there are {', '.join(COMMANDS)}")
    cells = []
    for variant in plan.variants():
        budget = check_variant(plan, variant, folder)
        cells += [plan.cell(variant, seed, folder, budget) for seed in plan.seeds]
    return cells


def check_variant(plan: SweepFile, variant: GridPoint, folder: Path) -> tuple[str, ...]:
    """Parse a variant's command lines; the words that make its network match the budget."""
    cell = plan.cell(variant, plan.seeds[0], folder)
    try:
        words = cell.words()
        namespace = parsed_fit(words[0])
        for rest in words[1:]:
            check(evaluate, rest)
        if plan.budget is None:
            return ()
        network = config_from_dict(MVARConfig, namespace.model.network.as_dict(), plan.path)
        fitted = matched(network, plan.budget.by, parameters=plan.budget.parameters, flops=plan.budget.flops)
    except (argparse.ArgumentError, InputError) as error:
        raise InputError(f"{plan.path}: cell {cell.name}: {' '.join(str(error).split())}") from error
    changed = [field.name for field in fields(network) if getattr(network, field.name) != getattr(fitted, field.name)]
    names = dict.fromkeys([plan.budget.by, *changed])
    return tuple(word for name in names for word in (f"--model.network.{name}", str(getattr(fitted, name))))


def run(cells: list[Cell], launch: Launcher, stop: Stop, show: Callable[[], None]) -> None:
    """Try what is not finished, and once more what has crashed."""
    todo = [cell for cell in cells if cell.state() != "finished"]
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            trying = pool.submit(launch, [cell.folder for cell in todo], stop)
            try:
                while not trying.done():
                    show()
                    time.sleep(REFRESH_S)
            except BaseException:
                stop.signal = signal.SIGTERM  # or leaving here would wait for all cells
                raise
            trying.result()
        todo = [cell for cell in todo if cell.state() == "crashed"]
        if stop.signal or not todo:
            break
    while any(cell.state() == "running" for cell in cells):  # a launcher has left it saving its state
        show()
        time.sleep(REFRESH_S)


def count(cells: list[Cell]) -> str:
    """How many cells there are of each state."""
    states = [cell.state() for cell in cells]
    each = [f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "finished"]
    return ", ".join([f"{states.count('finished')} of {len(cells)} cells finished", *each])


def refuse_unfinished(cells: list[Cell]) -> None:
    left = [(cell, state) for cell in cells if (state := cell.state()) != "finished"]
    if left:
        names = "; ".join(f"{cell.name} {state}, see {cell.log}" for cell, state in left)
        raise InputError(f"{len(left)} of {len(cells)} cells have not finished: {names}; the same command tries again")


@contextmanager
def stopping() -> Iterator[Stop]:
    """What turns from SIGINT, SIGTERM and SIGHUP into the end of all work, in order."""
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        stop.signal = stop.signal or number

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> None:
    call(sweep, argv, positional=True)
