"""Training throughput."""

from __future__ import annotations

import time

import lightning as L

from lightning_mvar.errors import require_in
from lightning_mvar.models.costs import forward_flops
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.mvar import LitMVAR


class ThroughputCallback(L.Callback):
    """Logs `perf/images_per_s` and `perf/tokens_per_s` over all ranks, and `perf/mfu` if the peak FLOP/s are given.

    Includes waiting for data, excludes validation with its sampling and scoring. MFU (model FLOPs utilization) divides
    the FLOPs of forward and backward pass by the peak; recomputed blocks do not count twice. Rates are means since the
    last logged step (`trainer.log_every_n_steps`), because host and GPU are only synchronized there.

    Args:
        peak_flops: peak FLOP/s of one device in the training precision, from its data sheet.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        require_in("(0, inf)", "ThroughputCallback's ", peak_flops=peak_flops)
        self.peak_flops, self.flops_per_image = peak_flops, 0
        self.start: float | None = None
        self.batches = 0  # since start

    def restart_clock(self, start: float | None) -> None:
        self.start, self.batches = start, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restart_clock(None)  # skip the first steps, which are slow
        if self.peak_flops is not None and isinstance(pl_module, LitMVAR):
            self.flops_per_image = 3 * forward_flops(pl_module.network_config)  # a backward pass is two forwards

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restart_clock(time.perf_counter())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.batches += 1
        assert isinstance(pl_module, ScheduledModule)
        if not pl_module.is_logging_step:
            return
        end = time.perf_counter()
        if self.start is not None:
            images = self.batches * pl_module.batch_of_all_ranks
            rate = images / (end - self.start)
            pl_module.log("perf/images_per_s", rate)
            if isinstance(pl_module, LitMVAR):
                pl_module.log("perf/tokens_per_s", rate * pl_module.network_config.schedule.num_tokens)
                if self.peak_flops is not None:
                    pl_module.log("perf/mfu", rate * self.flops_per_image / (self.peak_flops * trainer.world_size))
        self.restart_clock(end)
