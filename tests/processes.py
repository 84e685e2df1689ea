"""Runs commands in separate processes, which start in a fraction of a second because a fork server has the imports.

Ranks are started as a cluster would start them, so that a test can kill, stop or fail each one individually.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from lightning_mvar.sweeps.processes import FORKSERVER, SERVER_BLOCKED_SIGNALS

# A process has only one fork server. It imports everything that any test needs, and computes what most runs need. The
# package's own choice for sweeps is smaller, and the last one counts, so the import above must come first.
CONTEXT = FORKSERVER
PRELOADED = [
    "lightning_mvar.sweeps.forkserver_signals",
    "lightning_mvar.cli.training",
    "lightning_mvar.metrics.classifiers.digits",
    "s3fs",  # this and the next are imported by every run of Lightning, and of its DDP
    "torch.distributed.algorithms.ddp_comm_hooks",
    "warm_caches",  # last
]
CONTEXT.set_forkserver_preload(PRELOADED)
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass
class Run:
    """The ranks of one command and their output files."""

    ranks: list[ForkServerProcess]
    outputs: list[Path]

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Returns the exit codes; ranks that still run after `seconds` are killed and give None."""
        deadline = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(deadline - time.monotonic(), 0))
        codes = [rank.exitcode for rank in self.ranks]
        self.send(signal.SIGKILL)
        return codes

    def send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                os.kill(rank.pid, number)
        if number == signal.SIGKILL:
            for rank in self.ranks:
                rank.join()

    def printed(self) -> str:
        return "\n".join(path.read_text() for path in self.outputs)


def start(
    argv: list[str],
    folder: Path,
    devices: int = 1,
    prepare: Callable[[int], None] | None = None,
    name: str = "out",
    option: str = "--trainer.devices",
) -> Run:
    """Starts a command in `folder` with one process per device; `option` sets the number of devices.

    `prepare(rank)` is called first in each process.
    """
    outputs = [folder / f"{name}.rank{rank}.txt" for rank in range(devices)]
    cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(devices)}
    if devices > 1:
        argv = [*argv, option, str(devices)]
    ranks = []
    for rank, output in enumerate(outputs):
        environment = cluster | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"} if devices > 1 else {}
        process = CONTEXT.Process(target=run_rank, args=(argv, folder, environment, output, rank, prepare))
        process.start()
        ranks.append(process)
    return Run(ranks, outputs)


def run_two_ranks(function: Callable[[int, Path], None], folder: Path) -> list[int | None]:
    """Calls `function(rank, folder)` in two processes and returns their exit codes."""
    ranks = [CONTEXT.Process(target=function, args=(rank, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return Run(ranks, []).wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_rank(
    argv: list[str],
    folder: Path,
    environment: dict[str, str],
    output: Path,
    rank: int,
    prepare: Callable[[int], None] | None,
) -> None:
    import torch

    from lightning_mvar.cli import main

    signal.pthread_sigmask(signal.SIG_UNBLOCK, SERVER_BLOCKED_SIGNALS)  # the server may be that of sweeps
    multiprocessing.set_start_method(None, force=True)  # the command picks its own, as if started from a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background of a shell
    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(folder)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = ["lightning-mvar", *argv]
    if prepare is not None:
        prepare(rank)
    main()
