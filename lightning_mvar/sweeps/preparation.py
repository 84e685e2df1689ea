"""What a sweep runs before its cells, once: a tokenizer, token shards."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.locks import FileLock
from lightning_mvar.sweeps.cells import ASKED_TO_END, config_hashes, read_record
from lightning_mvar.sweeps.processes import Stop, Surroundings, wait_unless


def prepare(commands: tuple[tuple[str, ...], ...], out: Path, stop: Stop, lock: FileLock) -> None:
    """Run the commands in order, from the first on that has not finished with these words and YAML files.

    A command that is interrupted (see `stop`) ends the preparation; the next start runs it again.

    Raises:
        InputError: if a command fails; its own message has been printed.
    """
    record = out / "prepare.json"
    before = read_record(record) if record.is_file() else []
    done: list[dict[str, Any]] = []
    for words in commands:
        command = shlex.join(words)
        about = {"command": command, "configs": config_hashes((command,))}
        if len(done) < len(before) and before[len(done)] == about:
            done.append(about)
            print(f"[prepare] lightning-mvar {command}: finished before, skipped", flush=True)
            continue
        before = []  # what follows is made from what is made anew
        print(f"[prepare] lightning-mvar {command}", flush=True)
        code = wait_unless(stop, list(words), Surroundings(lock=lock))  # the next sweep waits for its end
        if stop.signal:
            return
        if code in ASKED_TO_END:
            raise InputError(f"`lightning-mvar {command}` was interrupted; the same sweep goes on with it")
        if code:
            raise InputError(f"`lightning-mvar {command}` failed with code {code}: what it printed says why")
        done.append(about)
        with atomic_path(record) as path:
            path.write_text(json.dumps(done, indent=2) + "\n")
