"""Progress bar of a training run."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_mvar.errors import InputError
from lightning_mvar.training.base import ScheduledModule


class StepProgressBar(TQDMProgressBar):
    """Shows the steps of the whole run: number done, time left, and the rate of this process.

    Lightning's bars show the batches of one epoch. If a run resumes within an epoch, they do not know its length, and
    count the earlier batches as if they had taken no time.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate, leave=False)  # one bar serves the whole run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not isinstance(pl_module, ScheduledModule):
            name = type(pl_module).__name__
            raise InputError(f"StepProgressBar needs a module of lightning_mvar, not {name}: use TQDMProgressBar")
        bar = self.train_progress_bar
        bar.unit = "step"
        bar.reset(total=pl_module.total_steps)
        bar.n = bar.initial = trainer.global_step
        self.on_train_epoch_start(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if self.is_enabled and step > bar.n and (step % self.refresh_rate == 0 or step == bar.total):
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*args)
        metrics.pop("v_num", None)  # the name of the logger's folder, the same in all runs
        return metrics
