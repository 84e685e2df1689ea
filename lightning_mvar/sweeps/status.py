"""Status display of a running sweep: a table of its cells on a terminal, a line per change or tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Any

from lightning_mvar.sweeps.cells import Cell, State, attempts, last_line, progress

# Order of the rows: a terminal may be too short for all cells.
URGENCY: tuple[State, ...] = ("crashed", "running", "interrupted", "waiting", "finished")
COLORS: dict[State, str] = {"running": "cyan", "finished": "green", "crashed": "red", "interrupted": "yellow"}


@contextmanager
def status_table(cells: list[Cell]) -> Iterator[Callable[[], None]]:
    """Yields a callback that refreshes the status display."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.live import Live

        with Live(render_table(cells), auto_refresh=False) as live:
            yield lambda: live.update(render_table(cells), refresh=True)
            live.update(render_table(cells), refresh=True)
        return
    shown: dict[str, tuple[State, str]] = {cell.name: (cell.state(), "") for cell in cells}

    def print_changes() -> None:
        for cell in cells:
            state = cell.state()
            now = state, tenth(progress(cell)) if state == "running" else ""
            if now != shown[cell.name]:
                shown[cell.name] = now
                print(status_line(cell, state), flush=True)

    yield print_changes
    print_changes()


def status_line(cell: Cell, state: State) -> str:
    """Returns one line with a cell's state, and the attempt, duration or log line that explains it."""
    history = attempts(cell.folder)
    if not history:
        return f"[{cell.name}] {state}"
    last = history[-1]
    number = "" if len(history) == 1 else f" (attempt {last.attempt})"
    if state == "running":
        return f"[{cell.name}] running{number}: {progress(cell)}"
    if state == "finished":
        return f"[{cell.name}] finished in {last.seconds:.0f} s{number}"
    reason = f", code {last.code}: {last_line(cell.log)}" if state == "crashed" else ""
    return f"[{cell.name}] {state}{number}{reason}"


def tenth(progress: str) -> str:
    """Rounds `fit 250/560` down to a tenth of the steps, `fit 4`: how often a line is worth printing."""
    name, _, steps = progress.partition(" ")
    done, _, total = steps.partition("/")
    return f"{name} {10 * int(done) // int(total)}" if total else name


def render_table(cells: list[Cell]) -> Any:
    """Returns a rich table with one row per cell, the most urgent first."""
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, expand=True)
    for title in ("cell", "state", "tries", "time", "progress"):
        rows.add_column(title, no_wrap=True)
    rows.add_column("last line of its log", no_wrap=True, overflow="ellipsis", ratio=1)
    states = [(cell, cell.state()) for cell in cells]
    for cell, state in sorted(states, key=lambda pair: URGENCY.index(pair[1])):
        history = attempts(cell.folder)
        log = last_line(cell.log) if state in ("running", "crashed") else ""
        seconds = elapsed(history[-1].begin, history[-1].seconds, state) if history else ""
        tries = str(len(history)) if history else ""
        steps = Text(progress(cell) if state == "running" else "")
        rows.add_row(Text(cell.name), Text(state, COLORS.get(state, "")), tries, seconds, steps, Text(log))
    return rows


def elapsed(begin: str, seconds: float | None, state: State) -> str:
    """Returns the duration of an attempt as minutes:seconds; empty if it is unknown."""
    if seconds is None and state == "running":
        seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(begin)).total_seconds()
    return "" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
