"""How fast training goes."""

from __future__ import annotations

import time

import lightning as L

from lightning_mvar.errors import InputError
from lightning_mvar.models.costs import forward_flops
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.mvar import LitMVAR


class ThroughputCallback(L.Callback):
    """Logs `perf/images_per_s` and `perf/tokens_per_s` over all ranks, and `perf/mfu` if it knows the devices' peak.

    Waiting for data counts; validation, with the sampling and scoring in it, does not. MFU is the share of the peak
    that the counted operations of forward and backward pass make; blocks that are run again do not count twice. Rates
    are those since the loggers looked last (`trainer.log_every_n_steps`): only then does the host know where a GPU is.

    Args:
        peak_flops: operations a second of one device at best in the precision of training, from its data sheet.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise InputError(f"peak_flops of the throughput callback must be positive, got {peak_flops}")
        self.peak_flops, self.flops_per_image = peak_flops, 0
        self.begin: float | None = None
        self.batches = 0  # since then

    def begin_anew(self, begin: float | None) -> None:
        self.begin, self.batches = begin, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin_anew(None)  # the first steps are slow
        if self.peak_flops is not None and isinstance(pl_module, LitMVAR):
            self.flops_per_image = 3 * forward_flops(pl_module.network_config)  # a backward pass is two forwards

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin_anew(time.perf_counter())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.batches += 1
        assert isinstance(pl_module, ScheduledModule)
        if not pl_module.logs_now:
            return
        end = time.perf_counter()
        if self.begin is not None:
            images = self.batches * pl_module.batch_of_all_ranks
            self.log_rates(trainer, pl_module, images / (end - self.begin))
        self.begin_anew(end)

    def log_rates(self, trainer: L.Trainer, pl_module: L.LightningModule, rate: float) -> None:
        pl_module.log("perf/images_per_s", rate)
        if isinstance(pl_module, LitMVAR):
            pl_module.log("perf/tokens_per_s", rate * pl_module.network_config.schedule.num_tokens)
            if self.peak_flops is not None:
                pl_module.log("perf/mfu", rate * self.flops_per_image / (self.peak_flops * trainer.world_size))
