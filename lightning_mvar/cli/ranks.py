"""Multi-process commands: one process per device, all of which stop if one fails."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from lightning_mvar.cli.rendezvous import limit_start
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError, Interrupted, one_line, require_in
from lightning_mvar.training.lightning_internals import started_processes
from lightning_mvar.training.lost_ranks import first_sentence, is_loss_of_rank

# Ranks share no weights and rarely wait for each other, but then perhaps for hours. With gloo, no GPU waits, and the
# death of a rank is noticed at once.
BARRIER_TIMEOUT = timedelta(days=30)


@contextmanager
def launch_ranks(device: str, devices: int, num_nodes: int) -> Iterator[Fabric]:
    """Starts this command once per device, or joins the processes that torchrun or Slurm has started.

    Code that may fail in a single process belongs inside the context; see `stop_ranks_on_error`.

    Args:
        device: auto, cpu, cuda, or cuda:N for a single device.
        devices: number of devices per node.
        num_nodes: number of machines.

    Raises:
        InputError: if the devices are unavailable, or another rank has exited.
    """
    require_in("[1, inf)", "--", devices=devices, num_nodes=num_nodes)
    torch_device, several = choose_device(device), devices * num_nodes > 1
    one_gpu = torch_device.type != "cpu" and torch_device.index is not None
    if several and one_gpu:
        raise InputError(
            f"--device {device} is a single device: use --device {torch_device.type} for --devices {devices}, "
            f"--num_nodes {num_nodes}"
        )
    try:
        fabric = Fabric(
            accelerator=torch_device.type,
            devices=[torch_device.index] if one_gpu else devices,
            num_nodes=num_nodes,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=BARRIER_TIMEOUT) if several else "auto",
        )
    except (ValueError, RuntimeError) as error:  # Lightning's message for unavailable devices
        raise InputError(one_line(error)) from error
    with stop_ranks_on_error(fabric.strategy, "run the same command again to continue"):
        fabric.launch()
        yield fabric


@contextmanager
def stop_ranks_on_error(strategy: Any, remedy: str, progress: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Kills the processes that this one has started if it fails; otherwise they would wait for it until a timeout.

    Args:
        strategy: strategy of the trainer or the fabric.
        remedy: how to continue, for the error message after the loss of another rank.
        progress: returns how far this rank got, for the same message.

    Raises:
        InputError: if another rank has exited or never starts; its own message gives the reason.
    """
    limit_start(strategy)
    try:
        yield
    except BaseException as error:
        rank, several = getattr(strategy, "global_rank", 0), getattr(strategy, "world_size", 1) > 1
        for process in started_processes(strategy):
            process.send_signal(signal.SIGKILL)
        if isinstance(error, Interrupted) and several:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun and torchrun send it to the last ranks to exit
        if isinstance(error, Interrupted) and rank > 0:
            sys.exit(0)  # rank 0 reports it; a nonzero exit code here would make rank 0 kill itself
        if is_loss_of_rank(error):
            raise InputError(
                f"rank {rank} lost another rank{progress()} ({first_sentence(error)}): see the message of that rank; "
                f"{remedy}"
            ) from error
        raise
