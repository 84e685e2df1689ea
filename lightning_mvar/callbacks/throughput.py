"""How fast training goes."""

from __future__ import annotations

import time
from collections import deque

import lightning as L

from lightning_mvar.module import LitMVAR


class ThroughputCallback(L.Callback):
    """Logs `perf/images_per_s` and `perf/tokens_per_s` over all ranks.

    Waiting for data counts; validation, with the sampling and scoring in it, does not.

    Args:
        window: the rate is taken over this many of the last batches.
    """

    def __init__(self, window: int = 10) -> None:
        self.ends: deque[float] = deque(maxlen=window + 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ends.clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ends.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) < 2 or not pl_module.logs_now:
            return
        images = (len(self.ends) - 1) * trainer.datamodule.batch_size * trainer.world_size  # type: ignore[attr-defined]
        rate = images / (self.ends[-1] - self.ends[0])
        pl_module.log("perf/images_per_s", rate)
        if isinstance(pl_module, LitMVAR):
            pl_module.log("perf/tokens_per_s", rate * pl_module.network_config.schedule.num_tokens)
