"""Ending a run when a signal asks for it, at the same step on all ranks, so that its state can be saved first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from lightning_mvar.errors import Interrupted
from lightning_mvar.training.lightning_internals import silence_sigterm_broadcast

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, preemption, Slurm's warning before the time limit


class InterruptionCallback(L.Callback):
    """Raises `Interrupted` between two steps after SIGINT, SIGTERM or SIGUSR1, wherever the signal arrived.

    Before every batch the ranks agree, over a group of their own that no GPU waits for, on what they had received one
    batch before: so no rank waits for one that is less than a batch behind. A second Ctrl-C does not wait for the step
    to end, and nothing is saved. Always part of `fit` and `train-tokenizer`.
    """

    def __init__(self) -> None:
        self.received = 0
        self.group: dist.ProcessGroup | None = None
        self.asking: tuple[dist.Work, torch.Tensor] | None = None  # what becomes the number of a signal, or 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.received, self.asking = 0, None
        if trainer.world_size > 1:
            timeout = getattr(trainer.strategy, "_timeout", None)  # not gloo's own, but what the run is to wait
            self.group = dist.new_group(backend="gloo", timeout=timeout)
            silence_sigterm_broadcast(trainer)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()

    def listen(self) -> None:
        """Take the place of Lightning's handlers, which save, or talk to other ranks, in the middle of a step."""
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.received = number

    def check(self, trainer: L.Trainer) -> None:
        """Raise `Interrupted` on all ranks if any has received a signal; all ranks must call this alike."""
        if number := self.received if self.group is None else self.agreed(self.group):
            name = signal.Signals(number).name
            raise Interrupted(number, f"interrupted by {name} after step {trainer.global_step}")

    def agreed(self, group: dist.ProcessGroup) -> int:
        """What any rank had received at the call before this one."""
        before, received = self.asking, torch.tensor(self.received)
        work = dist.all_reduce(received, dist.ReduceOp.MAX, group, async_op=True)
        assert work is not None
        self.asking = (work, received)
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.check(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.state.fn == "fit":
            self.check(trainer)


def end_if_asked(trainer: L.Trainer) -> None:
    """For long work between batches: end the run if a signal asks for it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, InterruptionCallback):
            callback.check(trainer)
