"""What a sweep shows while it runs: a table of its cells on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Any

from lightning_mvar.sweeps.cells import Cell, State, attempts, last_line

# What is shown first, where a terminal is too short for all cells.
URGENCY: tuple[State, ...] = ("crashed", "running", "interrupted", "waiting", "finished")
COLOURS: dict[State, str] = {"running": "cyan", "finished": "green", "crashed": "red", "interrupted": "yellow"}


@contextmanager
def status_table(cells: list[Cell]) -> Iterator[Callable[[], None]]:
    """Something to call every now and then, which shows how the cells are."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.live import Live

        with Live(table(cells), auto_refresh=False) as live:
            yield lambda: live.update(table(cells), refresh=True)
            live.update(table(cells), refresh=True)
        return
    states = {cell.name: cell.state() for cell in cells}

    def tell() -> None:
        for cell in cells:
            state = cell.state()
            if state != states[cell.name]:
                states[cell.name] = state
                print(line(cell, state), flush=True)

    yield tell
    tell()


def line(cell: Cell, state: State) -> str:
    """How a cell has become what it is."""
    tried = attempts(cell.folder)
    if not tried:
        return f"[{cell.name}] {state}"
    last = tried[-1]
    number = "" if len(tried) == 1 else f" (attempt {last.attempt})"
    if state == "finished":
        return f"[{cell.name}] finished in {last.seconds:.0f} s{number}"
    reason = f", code {last.code}: {last_line(cell.log)}" if state == "crashed" else ""
    return f"[{cell.name}] {state}{number}{reason}"


def table(cells: list[Cell]) -> Any:
    """A row for each cell, for rich: first those that ask for a look."""
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, expand=True)
    for title in ("cell", "state", "tries", "time"):
        rows.add_column(title, no_wrap=True)
    rows.add_column("last line of its log", no_wrap=True, overflow="ellipsis", ratio=1)
    states = [(cell, cell.state()) for cell in cells]
    for cell, state in sorted(states, key=lambda each: URGENCY.index(each[1])):
        tried = attempts(cell.folder)
        log = last_line(cell.log) if state in ("running", "crashed") else ""
        seconds = elapsed(tried[-1].begin, tried[-1].seconds, state) if tried else ""
        tries = str(len(tried)) if tried else ""
        rows.add_row(Text(cell.name), Text(state, COLOURS.get(state, "")), tries, seconds, Text(log))
    return rows


def elapsed(begin: str, seconds: float | None, state: State) -> str:
    """Of an attempt, minutes and seconds; nothing where nobody knows."""
    if seconds is None and state == "running":
        seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(begin)).total_seconds()
    return "" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
