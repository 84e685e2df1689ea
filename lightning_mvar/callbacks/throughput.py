"""How fast training goes."""

from __future__ import annotations

import time
from collections import deque

import lightning as L

from lightning_mvar.bench.subjects import forward_flops
from lightning_mvar.errors import InputError
from lightning_mvar.module import LitMVAR


class ThroughputCallback(L.Callback):
    """Logs `perf/images_per_s` and `perf/tokens_per_s` over all ranks, and `perf/mfu` if it knows the devices' peak.

    Waiting for data counts; validation, with the sampling and scoring in it, does not. MFU is the share of the peak
    that the counted operations of forward and backward pass make; blocks that are run again do not count twice.

    Args:
        window: the rate is taken over this many of the last batches.
        peak_flops: operations a second of one device at best in the precision of training, from its data sheet.
    """

    def __init__(self, window: int = 10, peak_flops: float | None = None) -> None:
        if window < 1 or (peak_flops is not None and peak_flops <= 0):
            raise InputError(
                f"window {window} of the throughput callback, and peak_flops {peak_flops}, must be positive"
            )
        self.peak_flops, self.flops_per_image = peak_flops, 0
        self.ends: deque[float] = deque(maxlen=window + 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ends.clear()
        if self.peak_flops is not None and isinstance(pl_module, LitMVAR):
            self.flops_per_image = 3 * forward_flops(pl_module.network_config)  # a backward pass is two forwards

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
            if self.peak_flops is not None:
                pl_module.log("perf/mfu", rate * self.flops_per_image / (self.peak_flops * trainer.world_size))
