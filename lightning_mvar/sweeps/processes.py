"""Commands of `lightning-mvar`, each in a process of its own."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from lightning_mvar.cli import main
from lightning_mvar.io.locks import FileLock

# A server imports everything once, which takes seconds, and starts each command's process from there.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["lightning_mvar.sweeps.server", "lightning_mvar.cli.training", "lightning_mvar.metrics.scores"]
)
# Its children begin with these held back.
SERVER_OUTLIVES = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# Starting a process looks at all others of this one, and an exit code can be read only once: one thread at a time.
ONE_AT_A_TIME = threading.Lock()
POLL_S = 0.05


@dataclass
class Stop:
    """Whether work that is under way is to end: the number of the signal that asked for it, 0 while none has."""

    signal: int = 0


@dataclass(frozen=True)
class Surroundings:
    """What a command runs in, where not in that of the process that starts it.

    Args:
        log: file that gets its output, after what is there.
        lock: held until the command has ended, though who started it dies before.
        share: of how many commands that run at once it is one, each with its part of the threads.
    """

    log: Path | None = None
    lock: FileLock | None = None
    share: int = 1


def wait_for(words: list[str]) -> int:
    """Run a command to its end and return its code; after Ctrl-C, which it receives too, leave it time to save."""
    process = start(words, Surroundings())
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()
        raise
    assert process.exitcode is not None
    return process.exitcode


def wait_unless(stop: Stop, words: list[str], surroundings: Surroundings | None = None) -> int:
    """Run a command to its end and return its code, from any thread; on `stop` it is sent SIGTERM and waited for.

    If this process dies, the command ends as if by SIGTERM: `fit` saves a checkpoint.

    Returns:
        The exit code, the negative number of a signal that killed it, or 128 + `stop.signal` if it never began.
    """
    if stop.signal:
        return 128 + stop.signal
    with ONE_AT_A_TIME:
        process = start(words, surroundings or Surroundings(), orphan_ends=True)
    told = False
    while True:
        with ONE_AT_A_TIME:
            code = process.exitcode
            if code is None and stop.signal and not told:
                process.terminate()
                told = True
        if code is not None:
            return code
        time.sleep(POLL_S)


def start(words: list[str], surroundings: Surroundings, orphan_ends: bool = False) -> ForkServerProcess:
    process = CONTEXT.Process(target=run_alone, args=(words, surroundings, orphan_ends))
    process.start()
    return process


def run_alone(words: list[str], surroundings: Surroundings, orphan_ends: bool) -> None:
    """In a process of its own."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SERVER_OUTLIVES)
    multiprocessing.set_start_method(None, force=True)  # a server's is inherited, and its processes would import anew
    if orphan_ends:
        threading.Thread(target=end_with_parent, daemon=True).start()
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a cluster's warning to the parent, which passes it on
    if surroundings.log is not None:
        with surroundings.log.open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if surroundings.share > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // surroundings.share))
    # What Lightning starts other ranks with.
    sys.argv[1:] = words
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("lightning_mvar.__main__")
    try:
        main()
    except KeyboardInterrupt:  # before the command has begun
        sys.exit(130)


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
