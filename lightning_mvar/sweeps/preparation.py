"""Preparation of a sweep: commands that run before its cells, once or once per seed, such as training a tokenizer."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lightning_mvar.errors import InputError
from lightning_mvar.io.json_files import write_json
from lightning_mvar.io.locks import FileLock
from lightning_mvar.sweeps.cells import INTERRUPTED_CODES, config_hashes, read_record
from lightning_mvar.sweeps.processes import ProcessContext, Stop, run_until_stopped


def prepare(commands: list[tuple[int | None, tuple[str, ...]]], out: Path, stop: Stop, lock: FileLock) -> None:
    """Runs the commands in order, except those that have finished with these arguments and YAML files.

    A command of one seed depends on the earlier commands of that seed and of all seeds, and runs again if one of them
    does; a command of all seeds depends on all earlier ones. An interrupted command (see `stop`) ends the preparation;
    the next start runs it again.

    Args:
        commands: arguments of each command, with the seed that it belongs to; None if it serves all seeds.
        out: folder of the sweep, which records the finished commands.
        stop: ends the preparation early.
        lock: lock of the sweep.

    Raises:
        InputError: if a command fails, after that command has printed its own message.
    """
    record = out / "prepare.json"
    before = read_record(record, list[dict[str, Any]], "remove it to prepare from scratch") if record.exists() else []
    done: list[dict[str, Any]] = []
    for seed, args in commands:
        command = shlex.join(args)
        entry = {"command": command, "configs": config_hashes((command,))} | ({} if seed is None else {"seed": seed})
        # What finished before of those commands that this one, or a later one on its output, depends on.
        chain = [other for other in before if seed is None or other.get("seed", seed) == seed]
        if chain and chain[0] == entry:
            before.remove(entry)
            done.append(entry)
            print(f"[prepare] lightning-mvar {command}: already finished, skipped", flush=True)
            continue
        before = [other for other in before if other not in chain]
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
        write_json(record, [*done, *before])
