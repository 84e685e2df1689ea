"""A cell of a sweep: one run with its seed, in a folder that keeps what it is and how often it was tried."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.locks import FileLock, is_locked
from lightning_mvar.sweeps.processes import POLL_S, Stop, Surroundings, wait_unless

State = Literal["waiting", "running", "finished", "crashed", "interrupted"]

# Codes of commands that were asked to end, or killed: no fault of their own.
ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ASKED_TO_END = {128 + number for number in ASKED} | {-number for number in (*ASKED, signal.SIGKILL)}
TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, and movements of progress bars


@dataclass(frozen=True)
class Attempt:
    """One try at a cell; without `code` it is under way, or was killed with all that could have told.

    Args:
        attempt: its number, from 1 on.
        begin: ISO time.
        end: ISO time.
        seconds: it took.
        code: exit code of the command that ended it; 0 if all ended well.
    """

    attempt: int
    begin: str
    end: str | None = None
    seconds: float | None = None
    code: int | None = None


@dataclass(frozen=True)
class Cell:
    """A run.

    Args:
        folder: of all that it leaves; its name is the cell's.
        axes: name of its value on each axis.
        seed: of training and sampling.
        commands: what to run in turn, as after `lightning-mvar` in a shell.
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
        """Output of all attempts."""
        return self.folder / "log.txt"

    @property
    def lock(self) -> Path:
        """Locked while the cell runs."""
        return self.folder / "lock"

    def words(self) -> list[list[str]]:
        """Of each command."""
        return [shlex.split(command) for command in self.commands]

    def identity(self) -> dict[str, Any]:
        """What cell.json holds; where this changes, another cell is meant."""
        definition = {"name": self.name, "axes": self.axes, "seed": self.seed, "commands": list(self.commands)}
        return definition | {"configs": config_hashes(self.commands)}

    @classmethod
    def read(cls, folder: Path) -> Cell:
        """What `record` has written."""
        about = read_record(folder / "cell.json")
        return cls(folder, about["axes"], about["seed"], tuple(about["commands"]))

    def check(self) -> None:
        """Raise InputError if the cell has been begun as another one."""
        path = self.folder / "cell.json"
        if not path.is_file() or not (attempts(self.folder) or is_locked(self.lock)):
            return
        before, now = read_record(path), self.identity()
        if changed := [key for key in now if before.get(key) != now[key]]:
            what = {"configs": "a YAML file that it names has changed"}.get(changed[0], "its commands have changed")
            raise InputError(
                f"cell {self.name} has been run before, and {what} since: choose another --out, or remove {self.folder}"
            )

    def record(self) -> None:
        """Write cell.json, for `run_cell`."""
        with atomic_path(self.folder / "cell.json") as path:
            path.write_text(json.dumps(self.identity(), indent=2) + "\n")

    def state(self) -> State:
        if is_locked(self.lock):
            return "running"
        tried = attempts(self.folder)
        if not tried:
            return "waiting"
        code = tried[-1].code
        if code == 0:
            return "finished"
        return "interrupted" if code is None or code in ASKED_TO_END else "crashed"


def config_hashes(commands: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of the YAML files that are named in commands."""
    words = {word.split("=")[-1] for command in commands for word in shlex.split(command)}
    words = {word for word in words if word.endswith((".yaml", ".yml"))}
    return {word: sha256(Path(word).read_bytes()).hexdigest() for word in sorted(words) if Path(word).is_file()}


def read_record(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): remove its folder to begin that cell anew") from error


def attempts(folder: Path) -> list[Attempt]:
    """All tries at a cell, in order."""
    path = folder / "attempts.jsonl"
    found: dict[int, dict[str, Any]] = {}
    whole, _, _ = path.read_text().rpartition("\n") if path.is_file() else ("", "", "")  # one may be being written
    for line in whole.splitlines():
        try:
            entry = json.loads(line)
            found[entry["attempt"]] = found.get(entry["attempt"], {}) | entry
            Attempt(**found[entry["attempt"]])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is damaged at {line!r}: remove that line, or the folder") from error
    return [Attempt(**entry) for entry in found.values()]


def run_cell(folder: Path, stop: Stop, share: int = 1) -> int:
    """Try a cell once: run its commands one after the other, as far as they end with 0.

    Waits first for a try that a dead sweep has left running. A cell that has finished is left alone.

    Args:
        folder: of the cell, with its cell.json.
        stop: ends the cell early; it goes on from there at the next try.
        share: of how many cells that run at once it is one.

    Returns:
        The code of the last command, see `wait_unless`.
    """
    cell = Cell.read(folder)
    with holding(cell, stop) as lock:
        if lock is None:
            return 128 + stop.signal
        before = attempts(folder)
        if before and before[-1].code == 0:
            return 0
        surroundings = Surroundings(cell.log, lock, share)
        number, begin = len(before) + 1, time.monotonic()
        append(folder, {"attempt": number, "begin": now()})
        for command, words in zip(cell.commands, cell.words(), strict=True):
            with cell.log.open("a") as log:
                log.write(f"[attempt {number}] lightning-mvar {command}\n")
            code = wait_unless(stop, words, surroundings)
            if code:
                break
        seconds = round(time.monotonic() - begin, 1)
        append(folder, {"attempt": number, "end": now(), "seconds": seconds, "code": code})
        return code


@contextmanager
def holding(cell: Cell, stop: Stop) -> Iterator[FileLock | None]:
    """The cell's lock, waited for; None if `stop` came first."""
    lock = None
    while not stop.signal and (lock := FileLock.take(cell.lock)) is None:
        time.sleep(POLL_S)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append(folder: Path, entry: dict[str, Any]) -> None:
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def last_line(path: Path) -> str:
    """What a file ends with, where a progress bar overwrites its line."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in TERMINAL.sub("", text).replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")
