"""Runs commands on hostile files in child processes with bounds on memory, disk and time."""

from __future__ import annotations

import resource
import time
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NamedTuple

from processes import start

SECONDS = 60.0  # per command; an ordinary one takes about one
MEMORY_BYTES = 2**30  # of address space, beyond what the process has before it runs
FILE_BYTES = 2**27  # per file


class Outcome(NamedTuple):
    """How a command ended."""

    code: int | None  # None if it ran out of time
    output: str  # stdout and stderr
    seconds: float
    peak_bytes: int  # resident memory beyond what the process had before


def run_bounded(argv: list[str], folder: Path) -> Outcome:
    """Runs one command in `folder`; memory and files beyond the bounds are refused by the kernel."""
    begin = time.monotonic()
    run = start(argv, folder, prepare=set_bounds)
    (code,) = run.wait(SECONDS)
    seconds = time.monotonic() - begin
    peak = folder / "peak_bytes"
    return Outcome(code, run.printed(), seconds, int(peak.read_text()) if peak.is_file() else 0)


def set_bounds(rank: int) -> None:
    pages, resident_pages, *_ = map(int, Path("/proc/self/statm").read_text().split())
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    before = resident_pages * resource.getpagesize()

    def write_peak() -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path("peak_bytes").write_text(str(max(peak - before, 0)))

    Finalize(None, write_peak, exitpriority=0)


def tree(folder: Path) -> set[str]:
    """Returns the paths of all files and folders below `folder`."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
