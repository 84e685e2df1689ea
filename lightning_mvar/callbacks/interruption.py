"""Ends a run on a signal, at the same step on all ranks, so that its state can be saved first."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L

from lightning_mvar.errors import Interrupted
from lightning_mvar.training.collectives import DelayedMax
from lightning_mvar.training.lightning_internals import collective_timeout, silence_sigterm_broadcast
from lightning_mvar.training.lost_ranks import abort_collectives, is_loss_of_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, preemption, Slurm's warning before the time limit


class InterruptionCallback(L.Callback):
    """Raises `Interrupted` on all ranks between two steps, after any rank has received SIGINT, SIGTERM or SIGUSR1.

    Before each batch the ranks exchange the signals received before the previous one; see `DelayedMax`. A second Ctrl-C
    ends the run within the step and saves nothing. Always part of `fit` and `train-tokenizer`.
    """

    def __init__(self) -> None:
        self.received = 0
        self.signal_of_any_rank: Callable[[int], int] = int  # 0 for none

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.received, self.signal_of_any_rank = 0, DelayedMax(collective_timeout(trainer))
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
        if number := self.signal_of_any_rank(self.received):
            name = signal.Signals(number).name
            raise Interrupted(number, f"interrupted by {name} after step {trainer.global_step}")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.check(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.state.fn == "fit":
            self.check(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Frees the GPU of a rank that has lost another one, before other callbacks and the trainer read from it."""
        if is_loss_of_rank(exception):
            abort_collectives()


def raise_if_interrupted(trainer: L.Trainer) -> None:
    """Raises `Interrupted` if any rank has received a signal; for long work between batches."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, InterruptionCallback):
            callback.check(trainer)
