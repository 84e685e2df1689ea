"""Ends a run on a signal, at the same step on all ranks, so that its state can be saved first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from lightning_mvar.errors import Interrupted
from lightning_mvar.training.lightning_internals import collective_timeout, silence_sigterm_broadcast
from lightning_mvar.training.lost_ranks import abort_stuck_collectives, is_loss_of_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, preemption, Slurm's warning before the time limit


class InterruptionCallback(L.Callback):
    """Raises `Interrupted` on all ranks between two steps, after any rank has received SIGINT, SIGTERM or SIGUSR1.

    Before each batch the ranks reduce the received signals, over a gloo group that no GPU waits for, and read the
    result of the reduction before that. So no rank waits for one that is less than a batch behind. A second Ctrl-C
    ends the run within the step and saves nothing. Always part of `fit` and `train-tokenizer`.
    """

    def __init__(self) -> None:
        self.received = 0
        self.group: dist.ProcessGroup | None = None
        self.pending_reduce: tuple[dist.Work, torch.Tensor] | None = None  # reduces to a signal number, or 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.received, self.pending_reduce = 0, None
        if trainer.world_size > 1:
            timeout = collective_timeout(trainer)  # the run's timeout instead of gloo's default
            self.group = dist.new_group(backend="gloo", timeout=timeout)
            silence_sigterm_broadcast(trainer)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()

    def listen(self) -> None:
        """Replaces Lightning's handlers, which save or communicate with other ranks in the middle of a step."""
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.received = number

    def check(self, trainer: L.Trainer) -> None:
        """Raises `Interrupted` on all ranks if any has received a signal; all ranks must call this equally often."""
        if number := self.received if self.group is None else self.signal_of_any_rank(self.group):
            name = signal.Signals(number).name
            raise Interrupted(number, f"interrupted by {name} after step {trainer.global_step}")

    def signal_of_any_rank(self, group: dist.ProcessGroup) -> int:
        """Returns the largest signal number that any rank had received at the previous call; 0 for none."""
        previous, received = self.pending_reduce, torch.tensor(self.received)
        work = dist.all_reduce(received, dist.ReduceOp.MAX, group, async_op=True)
        assert work is not None
        self.pending_reduce = (work, received)
        if previous is None:
            return 0
        previous[0].wait()
        return int(previous[1])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.check(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.state.fn == "fit":
            self.check(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Frees the GPU of a rank that has lost another one; checkpoints, which come later, can then be saved."""
        if is_loss_of_rank(exception):
            abort_stuck_collectives()


def raise_if_interrupted(trainer: L.Trainer) -> None:
    """Raises `Interrupted` if any rank has received a signal; for long work between batches."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, InterruptionCallback):
            callback.check(trainer)
