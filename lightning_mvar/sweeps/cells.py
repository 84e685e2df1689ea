"""Cells of a sweep: one run with one seed each, in a folder that records its definition and its attempts."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning_mvar.errors import InputError
from lightning_mvar.io.configs import find_config, with_included
from lightning_mvar.io.files import read_regular
from lightning_mvar.io.json_files import MAX_JSON_BYTES, checked, parse_json, shown, write_json
from lightning_mvar.io.locks import FileLock, is_locked, poll_lock
from lightning_mvar.sweeps.processes import WHOLE_MACHINE, ProcessContext, Share, Stop, run_until_stopped

T = TypeVar("T")
State = Literal["waiting", "running", "finished", "crashed", "interrupted"]

# Exit codes of commands that were stopped or killed from outside, as opposed to crashed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
INTERRUPTED_CODES = {128 + number for number in STOP_SIGNALS} | {-number for number in (*STOP_SIGNALS, signal.SIGKILL)}
MAX_SECONDS = 10**10  # of an attempt; 300 years
BAR = re.compile(r"(\d+/[1-9]\d*) \[[^\n]*?(?:step|img)")  # progress of training or drawing, not of validation
ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colors and cursor movements of progress bars


@dataclass(frozen=True)
class Attempt:
    """One attempt at a cell. Without `code` it is still running, or was killed before an exit code could be recorded.

    Args:
        attempt: number of the attempt, starting at 1.
        begin: start time, ISO 8601.
        end: end time, ISO 8601.
        seconds: duration.
        code: exit code of the last command that ran; 0 if all commands succeeded.
        commands: number of the cell's commands that have succeeded, those of earlier attempts included; 0 if none has
            in this attempt.
    """

    attempt: int
    begin: str
    end: str | None = None
    seconds: float | None = None
    code: int | None = None
    commands: int = 0

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 <= self.seconds < MAX_SECONDS:
            raise ValueError(f"seconds is {self.seconds}; it must be from 0 to {MAX_SECONDS}")


@dataclass(frozen=True)
class CellRecord:
    """Content of cell.json: the cell's definition, and the SHA-256 of each YAML file that its commands name."""

    name: str
    axes: dict[str, str]
    seed: int
    commands: tuple[str, ...]
    configs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        folder: folder of all outputs; its name is the name of the cell.
        axes: name of the cell's value on each axis.
        seed: seed of training and sampling.
        commands: command lines to run in order, as written after `lightning-mvar` in a shell.
    """

    folder: Path
    axes: dict[str, str]
    seed: int
    commands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        """Returns the path of the log that collects the output of all attempts."""
        return self.folder / "log.txt"

    @property
    def lock(self) -> Path:
        """Returns the path of the file that is locked while the cell runs."""
        return self.folder / "lock"

    def argument_lists(self) -> list[list[str]]:
        """Returns the arguments of each command."""
        return [shlex.split(command) for command in self.commands]

    def identity(self) -> CellRecord:
        """Returns the content of cell.json."""
        return CellRecord(self.name, self.axes, self.seed, self.commands, config_hashes(self.commands))

    @classmethod
    def read(cls, folder: Path) -> Cell:
        """Reads the cell that `record` has written."""
        definition = read_record(folder / "cell.json", CellRecord)
        return cls(folder, definition.axes, definition.seed, definition.commands)

    def check(self) -> None:
        """Raises InputError if the cell was started with another definition. Commands may follow the former ones."""
        path = self.folder / "cell.json"
        if not path.is_file() or not (attempts(self.folder) or is_locked(self.lock)):
            return
        before = asdict(read_record(path, CellRecord))
        now = asdict(replace(self, commands=self.commands[: len(before["commands"])]).identity())
        if changed := [key for key in now if before[key] != now[key]]:
            reason = {"configs": "a YAML file that it names has changed"}.get(changed[0], "its commands have changed")
            raise InputError(
                f"cell {self.name} has been run before, and {reason} since: "
                f"choose another --out, or remove {self.folder}"
            )

    def record(self) -> None:
        """Writes cell.json, which `run_cell` reads."""
        write_json(self.folder / "cell.json", asdict(self.identity()))

    def state(self) -> State:
        return self.state_after(attempts(self.folder))

    def state_after(self, history: list[Attempt]) -> State:
        """Returns the state after these attempts, which are all so far."""
        if is_locked(self.lock):
            return "running"
        if not history:
            return "waiting"
        code = history[-1].code
        if code == 0:
            return "finished" if commands_done(history) == len(self.commands) else "waiting"
        return "interrupted" if code is None or code in INTERRUPTED_CODES else "crashed"


def config_hashes(commands: tuple[str, ...]) -> dict[str, str]:
    """Returns the SHA-256 of each existing YAML file that the commands name, together with those that it includes.

    Keys are the names as they are written: the package's files lie elsewhere in another environment.
    """
    args = {word.split("=")[-1] for command in commands for word in shlex.split(command)}
    named = {word: Path(find_config(word)) for word in sorted(args) if word.endswith((".yaml", ".yml"))}
    contents = {word: [p.read_bytes() for p in with_included(file)] for word, file in named.items() if file.is_file()}
    return {word: sha256(b"".join(content)).hexdigest() for word, content in contents.items()}


def read_record(path: Path, kind: type[T], remedy: str = "remove its folder to run that cell from scratch") -> T:
    """Reads a JSON file in the folder of a cell or sweep; `remedy` says what to do if it is missing or damaged."""
    if not path.exists():
        raise InputError(f"{path} is missing: {remedy}")
    data = read_regular(path, MAX_JSON_BYTES)
    try:
        return parse_json(data, kind, path.name)
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from error


def attempts(folder: Path) -> list[Attempt]:
    """Reads all attempts at a cell, in order."""
    path = folder / "attempts.jsonl"
    entries: dict[Any, dict[str, Any]] = {}
    complete, _, _ = read_regular(path, MAX_JSON_BYTES).rpartition(b"\n") if path.exists() else (b"", b"", b"")
    for line in complete.splitlines():  # without a half-written one
        try:
            entry = parse_json(line, dict[str, Any], "the line")
            number = checked(entry.get("attempt"), int, "its number")
            entries[number] = entries.get(number, {}) | entry
            checked(entries[number], Attempt, "the attempt")
        except InputError as error:
            raise InputError(f"{path} is damaged at {shown(line)}: {error}; remove that line, or the folder") from error
    return [Attempt(**entry) for entry in entries.values()]


def commands_done(history: list[Attempt]) -> int:
    """Returns how many of a cell's commands have succeeded, counted from its first."""
    return max((attempt.commands for attempt in history), default=0)


def run_cell(folder: Path, stop: Stop, share: Share = WHOLE_MACHINE) -> int:
    """Makes one attempt at a cell: runs its commands in order until one exits with a code other than 0.

    Commands that succeeded in an earlier attempt are not repeated.

    First waits for an attempt that a killed sweep left running. Does nothing if the cell has finished.

    Args:
        folder: folder of the cell, which holds its cell.json.
        stop: ends the cell early; the next attempt resumes it.
        share: what the cell gets of this machine.

    Returns:
        The exit code of the last command, see `run_until_stopped`.
    """
    cell = Cell.read(folder)
    with hold_lock(cell, stop) as lock:
        if lock is None:
            return 128 + stop.signal
        before = attempts(folder)
        done = commands_done(before)
        if done == len(cell.commands) and before[-1].code == 0:
            return 0
        context = ProcessContext(cell.log, lock, share)
        number, begin, code = len(before) + 1, time.monotonic(), 0
        append_attempt(folder, {"attempt": number, "begin": timestamp()})
        commands = zip(cell.commands, cell.argument_lists(), strict=True)
        for index, (command, args) in islice(enumerate(commands), done, None):
            with cell.log.open("a") as log:
                log.write(f"[attempt {number}] lightning-mvar {command}\n")
            code = run_until_stopped(stop, args, context)
            if code:
                break
            append_attempt(folder, {"attempt": number, "commands": index + 1})
        seconds = round(time.monotonic() - begin, 1)
        append_attempt(folder, {"attempt": number, "end": timestamp(), "seconds": seconds, "code": code})
        return code


@contextmanager
def hold_lock(cell: Cell, stop: Stop) -> Iterator[FileLock | None]:
    """Waits for the cell's lock and holds it; yields None if `stop` came first."""
    attempt = partial(FileLock.try_acquire, cell.lock)
    lock = None if stop.signal else poll_lock(attempt, lambda: stop.signal != 0)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def timestamp() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append_attempt(folder: Path, entry: dict[str, Any]) -> None:
    """Appends a line to attempts.jsonl, in place of one that a killed process left half-written."""
    with (folder / "attempts.jsonl").open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")


def last_line(path: Path) -> str:
    """Returns the last visible line of a log, where progress bars overwrite their own line."""
    return next((line.strip() for line in reversed(tail(path).split("\n")) if line.strip()), "")


def progress(cell: Cell) -> str:
    """Returns the command that a running cell is at and its last steps or images in the log: `fit 250/560`."""
    done = commands_done(attempts(cell.folder))
    if done == len(cell.commands):
        return ""
    bars = BAR.findall(tail(cell.log).rpartition("[attempt ")[2])
    return " ".join([cell.commands[done].split()[0], *bars[-1:]])


def tail(path: Path) -> str:
    """Returns the end of a log without colors, each state of a progress bar on a line; empty if there is no log."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        text = file.read().decode(errors="replace")
    return ANSI_ESCAPE.sub("", text).replace("\r", "\n")
