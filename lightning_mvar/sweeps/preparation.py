"""Preparation of a sweep: commands that run once before its cells, such as training a tokenizer."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lightning_mvar.errors import InputError
from lightning_mvar.io.json_files import write_json
from lightning_mvar.io.locks import FileLock
from lightning_mvar.sweeps.cells import INTERRUPTED_CODES, config_hashes, read_record
from lightning_mvar.sweeps.processes import ProcessContext, Stop, run_until_stopped


def prepare(commands: tuple[tuple[str, ...], ...], out: Path, stop: Stop, lock: FileLock) -> None:
    """Runs the commands in order, starting at the first that has not finished with these arguments and YAML files.

    An interrupted command (see `stop`) ends the preparation; the next start runs it again.

    Raises:
        InputError: if a command fails, after that command has printed its own message.
    """
    record = out / "prepare.json"
    before = read_record(record, list[dict[str, Any]]) if record.exists() else []
    done: list[dict[str, Any]] = []
    for args in commands:
        command = shlex.join(args)
        entry = {"command": command, "configs": config_hashes((command,))}
        if len(done) < len(before) and before[len(done)] == entry:
            done.append(entry)
            print(f"[prepare] lightning-mvar {command}: finished before, skipped", flush=True)
            continue
        before = []  # later commands depend on the output of this one, so they run again too
        print(f"[prepare] lightning-mvar {command}", flush=True)
        context = ProcessContext(lock=lock)  # the next sweep waits for this command to end
        code = run_until_stopped(stop, list(args), context)
        if stop.signal:
            return
        if code in INTERRUPTED_CODES:
            raise InputError(f"`lightning-mvar {command}` was interrupted: start the same sweep again to resume it")
        if code:
            raise InputError(f"`lightning-mvar {command}` failed with exit code {code}: see its output above")
        done.append(entry)
        write_json(record, done)
