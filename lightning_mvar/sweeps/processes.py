"""Child processes that run one `lightning-mvar` command each."""

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

# The fork server imports everything once, which takes seconds, and forks a process for each command.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["lightning_mvar.sweeps.forkserver_signals", "lightning_mvar.cli.training", "lightning_mvar.metrics.scores"]
)
# The server blocks these signals to outlive them; its children inherit the mask and unblock them.
SERVER_BLOCKED_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# Starting a process polls all other children, and an exit code can be read only once: one thread at a time.
PROCESS_LOCK = threading.Lock()
POLL_S = 0.05


@dataclass
class Stop:
    """A request to end running work: the number of the signal that asked for it, 0 if none has arrived."""

    signal: int = 0


@dataclass(frozen=True)
class Share:
    """Share of this machine that one of several commands gets.

    Args:
        concurrency: number of commands that run at once; each gets that fraction of the threads.
        gpus: GPUs that the command sees, as in CUDA_VISIBLE_DEVICES; all that this process sees if None.
    """

    concurrency: int = 1
    gpus: str | None = None


WHOLE_MACHINE = Share()


@dataclass(frozen=True)
class ProcessContext:
    """The context a command runs in, as far as it differs from that of the parent process.

    Args:
        log: file that the output is appended to.
        lock: lock that the command holds until it ends, even if its parent dies first.
        share: what the command gets of this machine.
    """

    log: Path | None = None
    lock: FileLock | None = None
    share: Share = WHOLE_MACHINE


def run_and_wait(args: list[str]) -> int:
    """Runs a command and returns its exit code; after Ctrl-C, which the command also receives, waits for it to save."""
    process = start(args, ProcessContext())
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()
        raise
    assert process.exitcode is not None
    return process.exitcode


def run_until_stopped(stop: Stop, args: list[str], context: ProcessContext | None = None) -> int:
    """Runs a command and returns its exit code; on `stop`, sends it SIGTERM and waits. Callable from any thread.

    If this process dies, the command receives SIGTERM too: `fit` saves a checkpoint.

    Returns:
        The exit code, the negative number of a signal that killed the command, or 128 + `stop.signal` if it never
        started.
    """
    if stop.signal:
        return 128 + stop.signal
    with PROCESS_LOCK:
        process = start(args, context or ProcessContext(), die_with_parent=True)
    terminated = False
    while True:
        with PROCESS_LOCK:
            code = process.exitcode
            if code is None and stop.signal and not terminated:
                process.terminate()
                terminated = True
        if code is not None:
            return code
        time.sleep(POLL_S)


def start(args: list[str], context: ProcessContext, die_with_parent: bool = False) -> ForkServerProcess:
    process = FORKSERVER.Process(target=run_in_child, args=(args, context, die_with_parent))
    process.start()
    return process


def run_in_child(args: list[str], context: ProcessContext, die_with_parent: bool) -> None:
    """Runs a command in the child process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SERVER_BLOCKED_SIGNALS)
    multiprocessing.set_start_method(None, force=True)  # the inherited one would import everything again
    if die_with_parent:
        threading.Thread(target=terminate_with_parent, daemon=True).start()
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the cluster warns the parent, which forwards it as SIGTERM
    if context.log is not None:
        with context.log.open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if context.share.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = context.share.gpus
    if context.share.concurrency > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // context.share.concurrency))
    # Lightning starts the other ranks from these.
    sys.argv[1:] = args
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("lightning_mvar.__main__")
    try:
        main()
    except KeyboardInterrupt:  # before the command has started
        sys.exit(130)


def terminate_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
