"""Multi-process commands: one process per device, all of which stop if one fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError, Interrupted, one_line
from lightning_mvar.training.lightning_internals import setup_with_timeout, started_processes

log = logging.getLogger(__name__)

START_TIMEOUT = "LIGHTNING_MVAR_START_TIMEOUT"  # environment variable: seconds for all ranks to start
DEFAULT_START_TIMEOUT_S, MAX_START_TIMEOUT_S, NOTICE_S = 180, 10**6, 15


@contextmanager
def launch_ranks(device: str, devices: int, num_nodes: int, strategy: DDPStrategy | None = None) -> Iterator[Fabric]:
    """Starts this command once per device, or joins the processes that torchrun or Slurm has started.

    Everything that can fail in one process only belongs inside the context; see `stop_ranks_on_error`.

    Args:
        device: auto, cpu, cuda, or cuda:N for a single device.
        devices: number of devices per node.
        num_nodes: number of machines.
        strategy: strategy if there are several processes; default: Fabric's "ddp".

    Raises:
        InputError: if the devices are unavailable, or another rank has ended.
    """
    if devices < 1 or num_nodes < 1:
        raise InputError(f"--devices and --num_nodes must be at least 1, got {devices} and {num_nodes}")
    where, several = choose_device(device), devices * num_nodes > 1
    one_gpu = where.type != "cpu" and where.index is not None
    if several and one_gpu:
        raise InputError(
            f"--device {device} is a single device: use --device {where.type} for --devices {devices}, "
            f"--num_nodes {num_nodes}"
        )
    try:
        fabric = Fabric(
            accelerator=where.type,
            devices=[where.index] if one_gpu else devices,
            num_nodes=num_nodes,
            strategy=(strategy or "ddp") if several else "auto",
        )
    except (ValueError, RuntimeError) as error:  # Lightning's message for unavailable devices
        raise InputError(one_line(error)) from error
    with stop_ranks_on_error(fabric.strategy, "run the same command again to continue"):
        fabric.launch()
        yield fabric


@contextmanager
def stop_ranks_on_error(strategy: Any, remedy: str, progress: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Kills the processes that this one has started if it fails: they would wait for it until their timeout.

    Args:
        strategy: strategy of the trainer or the fabric.
        remedy: how to continue, for the message that another rank has ended.
        progress: returns how far this rank got, for the same message.

    Raises:
        InputError: if another rank has ended or never starts; its own message gives the reason.
    """
    limit_start(strategy)
    try:
        yield
    except BaseException as error:
        rank = getattr(strategy, "global_rank", 0)
        for process in started_processes(strategy):
            process.send_signal(signal.SIGKILL)
        if isinstance(error, Interrupted) and rank > 0:
            sys.exit(0)  # rank 0 reports it; a nonzero exit code here would make rank 0 kill itself
        if is_loss_of_rank(error):
            raise InputError(
                f"rank {rank} lost another rank{progress()} ({first_sentence(error)}): the message of that rank says "
                f"why; {remedy}"
            ) from error
        raise


def limit_start(strategy: Any) -> None:
    """Makes the ranks wait for each other at the start for `START_TIMEOUT` only, instead of as long as a collective.

    A rank that is killed before the process group exists has no connection whose loss the others could notice.
    """
    if not hasattr(strategy, "_timeout"):  # a single device
        return
    seconds = start_timeout()
    setup_environment = strategy.setup_environment

    def setup_in_time() -> None:
        strategy.setup_environment = setup_environment
        rank, ranks = strategy.global_rank, strategy.world_size
        notice = Timer(NOTICE_S, lambda: log.info("rank %d is waiting for all %d ranks to start", rank, ranks))
        notice.start()
        try:
            setup_with_timeout(strategy, timedelta(seconds=seconds))
        except RuntimeError as error:
            if not is_loss_of_rank(error):
                raise
            raise InputError(
                f"rank {rank} gives up: not all {ranks} ranks started within {seconds:g} s ({first_sentence(error)}): "
                f"see the output of the other ranks, or set {START_TIMEOUT}=SECONDS to wait longer"
            ) from error
        finally:
            notice.cancel()

    strategy.setup_environment = setup_in_time


def start_timeout() -> float:
    """Returns the seconds to wait for all ranks to start; raises InputError if the environment gives no such number."""
    text = os.environ.get(START_TIMEOUT, str(DEFAULT_START_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_START_TIMEOUT_S:
        raise InputError(f"{START_TIMEOUT}={text!r} is not a number of seconds")
    return seconds


def is_loss_of_rank(error: BaseException) -> bool:
    """Returns whether an error of torch.distributed says that another rank cannot be reached."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def first_sentence(error: BaseException) -> str:
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0].rstrip(".")
