"""Several processes for one command, one for each device."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.launchers import _SubprocessScriptLauncher as FabricLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as TrainerLauncher

from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError, Interrupted


@contextmanager
def ranks(device: str, devices: int, num_nodes: int, strategy: DDPStrategy | None = None) -> Iterator[Fabric]:
    """Start this command once for each device, or join the processes that torchrun or Slurm has started.

    All that can fail in one process alone belongs inside: see `ending_together`.

    Args:
        device: auto, cpu, cuda, or cuda:N for a single one.
        devices: of each node.
        num_nodes: machines.
        strategy: of several processes, where not Fabric's own for this kind of device.

    Raises:
        InputError: if there are no such devices, or another rank has ended.
    """
    if devices < 1 or num_nodes < 1:
        raise InputError(f"--devices and --num_nodes must be at least 1, got {devices} and {num_nodes}")
    where, several = choose_device(device), devices * num_nodes > 1
    one_gpu = where.type != "cpu" and where.index is not None
    if several and one_gpu:
        raise InputError(f"--device {device} is a single one: name its kind alone for --devices {devices}")
    try:
        fabric = Fabric(
            accelerator=where.type,
            devices=[where.index] if one_gpu else devices,
            num_nodes=num_nodes,
            strategy=(strategy or "ddp") if several else "auto",
        )
    except (ValueError, RuntimeError) as error:  # Lightning's words for devices that are not there
        raise InputError(" ".join(str(error).split())) from error
    with ending_together(fabric.strategy, "the same command goes on with what is missing"):
        fabric.launch()
        yield fabric


@contextmanager
def ending_together(strategy: Any, remedy: str, progress: Callable[[], str] = lambda: "") -> Iterator[None]:
    """End the processes that this one has started when it fails: they would wait for it until their timeout.

    Args:
        strategy: of the trainer or the fabric.
        remedy: for whoever reads that another rank has ended.
        progress: how far this one came.

    Raises:
        InputError: if another rank has ended, whose own message tells why.
    """
    try:
        yield
    except BaseException as error:
        launcher, rank = strategy.launcher, getattr(strategy, "global_rank", 0)
        if isinstance(launcher, FabricLauncher | TrainerLauncher):
            for process in launcher.procs:
                process.send_signal(signal.SIGKILL)
        if isinstance(error, Interrupted) and rank > 0:
            sys.exit(0)  # rank 0 tells; a code here would make it kill itself
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            reason = str(error).split("] ", 1)[-1].split(". ")[0]
            raise InputError(
                f"rank {rank} lost another rank{progress()} ({reason}): that one's message says why; {remedy}"
            ) from error
        raise
