"""Frechet distance of samples, computed while a network trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_mvar.data.images import open_images
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.frechet import (
    FeatureStatistics,
    Statistics,
    frechet_distance,
    prepare_extractor,
    reference_statistics,
)
from lightning_mvar.module import LitMVAR
from lightning_mvar.sampling import generate, image_generators


class FIDCallback(L.Callback):
    """Samples after a validation pass and logs the Frechet distance to real images as `val/fid`.

    The same value is logged as `val/frechet_EXTRACTOR`, because a distance means something only together with its
    extractor: `val/fid` is there to select models by, and comparable to published FID only with InceptionV3.

    Every rank samples the same number of batches; image i is the same whatever the number of ranks and the batch size.

    Args:
        extractor: `nn.Module` with `num_features`, images (b, 3, H, W) in [0, 1] -> (b, num_features).
        reference: the real images: `digits:test`, or a folder of class folders.
        num_samples: images to sample, classes in turn.
        batch_size: images sampled at once on each rank.
        every_n_validations: sample after every n-th validation pass.
        guidance, top_k, top_p: of the sampling.
        seed: of the sampling.
        cache: folder that keeps the statistics of the real images.
    """

    def __init__(
        self,
        extractor: nn.Module,
        reference: str,
        num_samples: int = 1000,
        batch_size: int = 100,
        every_n_validations: int = 1,
        guidance: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int = 0,
        cache: str = "outputs/statistics",
    ) -> None:
        if num_samples < 2 or batch_size < 1 or every_n_validations < 1:
            raise InputError("the FID callback needs num_samples >= 2, batch_size >= 1 and every_n_validations >= 1")
        self.extractor, self.reference, self.cache = extractor, reference, Path(cache)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.sampling: dict[str, Any] = {"guidance": guidance, "top_k": top_k, "top_p": top_p}
        self.every_n_validations, self.validations = every_n_validations, 0
        self.real: Statistics | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Statistics of the real images, before any training is spent."""
        assert isinstance(pl_module, LitMVAR)
        images = open_images(self.reference, pl_module.tokenizer.config.resolution)
        self.extractor.to(pl_module.device)
        if trainer.is_global_zero:  # the others wait, then read what this rank cached
            reference_statistics(self.extractor, self.reference, images, self.cache)
        trainer.strategy.barrier()
        self.real = reference_statistics(self.extractor, self.reference, images, self.cache)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validations += 1
        if self.validations % self.every_n_validations:
            return
        assert isinstance(pl_module, LitMVAR)
        begin = time.perf_counter()
        metric = FeatureStatistics(prepare_extractor(self.extractor)).to(pl_module.device)
        self.sample_into(metric, trainer, pl_module)
        assert self.real is not None
        distance = frechet_distance(self.real, metric.compute())
        name = f"val/frechet_{type(self.extractor).__name__}"
        logged = {"val/fid": distance, name: distance, "perf/fid_s": time.perf_counter() - begin}
        pl_module.log_dict(logged, sync_dist=True)

    def state_dict(self) -> dict[str, int]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validations = state_dict["validations"]

    @torch.inference_mode()
    def sample_into(self, metric: FeatureStatistics, trainer: L.Trainer, pl_module: LitMVAR) -> None:
        """Update the metric with this rank's share of the samples."""
        classes = pl_module.network_config.num_classes
        stride = self.batch_size * trainer.world_size
        for begin in range(0, self.num_samples, stride):
            first = begin + trainer.global_rank * self.batch_size
            labels = torch.arange(first, first + self.batch_size, device=pl_module.device) % classes
            generators = image_generators(self.seed, first, self.batch_size)
            with trainer.precision_plugin.forward_context():
                images = generate(pl_module.network, pl_module.tokenizer, labels, generator=generators, **self.sampling)
            wanted = max(min(self.num_samples - first, self.batch_size), 0)  # the rest fills up an equal last batch
            if wanted:
                metric.update(self.extractor(images[:wanted].float()))
