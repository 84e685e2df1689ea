"""Images and code counts logged at each validation: samples, their formation scale by scale, and reconstructions."""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import Tensor

from lightning_mvar.callbacks.loggers import log_codes, log_image
from lightning_mvar.data.classes import Classes
from lightning_mvar.data.images.examples import ImageBatch, spaced_evenly
from lightning_mvar.errors import require_in
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.sampling.generate import draw_images, max_batch_size
from lightning_mvar.sampling.grids import formation_strip, image_grid, with_row_names
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.strategies import sampling_mode
from lightning_mvar.training.tokenizer import LitTokenizer


class SamplesCallback(L.Callback):
    """Logs samples after each validation: `samples`, a named row per class, and `strip`, images formed scale by scale.

    Samples from the weight average if one is kept. Histograms show how often each code was sampled: `sampled_codes/K`
    at the scale named K, `sampled_codes/all` at all scales.

    Args:
        classes: number of classes to show, spread evenly over all of them.
        per_class: images per row of the grid.
        sampling: guidance scale, top-k, top-p and seed, and the other options of `SamplingSettings`; the same at each
            validation, so that images can be compared.
        keep_sharded: gather a sharded network block by block, if it does not fit on one device as a whole; slower.
    """

    def __init__(
        self,
        classes: int = 10,
        per_class: int = 8,
        sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 (frozen)
        keep_sharded: bool = False,
    ) -> None:
        require_in("[1, inf)", "SamplesCallback's ", classes=classes, per_class=per_class)
        self.classes, self.per_class, self.keep_sharded, self.sampling = classes, per_class, keep_sharded, sampling
        self.guide: MVAR | None = None  # a weaker network, if `sampling` names one

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Loads the guide and the scorer, so that a bad one fails before training."""
        assert isinstance(pl_module, LitMVAR)
        self.guide = pl_module.prepare_sampling(self.sampling)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, LitMVAR)
        total = pl_module.network_config.num_classes
        shown = torch.linspace(0, total - 1, min(self.classes, total)).long()
        images, tokens = self.draw(trainer, pl_module, shown.repeat_interleave(self.per_class))
        if not trainer.is_global_zero:
            return
        classes = Classes(pl_module.class_names, total)
        names = [classes.name(label) for label in shown.tolist()]
        log_image(trainer, "samples", with_row_names(image_grid(images, self.per_class), names))
        steps = pl_module.tokenizer.decode_steps(tokens[:: self.per_class])
        log_image(trainer, "strip", with_row_names(formation_strip(step / 2 + 0.5 for step in steps), names))
        scales = tokens.split(pl_module.network_config.schedule.lengths, dim=1)
        counts = [scale.flatten().bincount(minlength=pl_module.network_config.vocab_size) for scale in scales]
        log_codes(trainer, "sampled_codes", torch.stack(counts), pl_module.network_config.schedule.names)

    def draw(self, trainer: L.Trainer, module: LitMVAR, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Draws images (b, 3, H, W) in [0, 1] and tokens (b, l), a share on each rank; all ranks get all of them.

        All shares have the same size, because the forward pass of a sharded network needs all ranks.
        """
        share = -(-len(labels) // trainer.world_size)
        first = trainer.global_rank * share
        indices = torch.arange(first, first + share).clamp(max=len(labels) - 1)
        drawn = []
        with sampling_mode(module.averaged, trainer.strategy, self.keep_sharded) as network:
            for part in indices.split(max_batch_size(module.network_config)):
                keys = self.sampling.keys(part.tolist())
                # No CUDA graphs: they start with the second batch, and capturing empties the allocator's cache.
                drawn.append(
                    draw_images(network, module.tokenizer, labels[part], self.sampling, keys, guide=self.guide)
                )
        shares = [torch.cat(parts) for parts in zip(*drawn, strict=True)]
        gathered = [trainer.strategy.all_gather(part) for part in shares]  # distributed strategies add a rank axis
        images, tokens = (
            t.flatten(0, t.ndim - part.ndim)[: len(labels)] for t, part in zip(gathered, shares, strict=True)
        )
        return images, tokens


class ReconstructionsCallback(L.Callback):
    """Logs `reconstructions` after each validation: a row of originals above a row of their reconstructions.

    Histograms `encoded_codes/K` and `encoded_codes/all` show how often each code was chosen for the validation images
    of rank 0.

    Args:
        images: number of images to show, spread evenly over the validation images of rank 0.
    """

    def __init__(self, images: int = 16) -> None:
        require_in("[1, inf)", "ReconstructionsCallback's ", images=images)
        self.images = images
        self.pairs: list[Tensor] = []  # (2, n, 3, H, W) of each batch of the current validation
        self.batch_size = 0  # of the first batch of the current validation

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pairs, self.batch_size = [], 0

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or not isinstance(outputs, Tensor):
            return
        size = self.batch_size = self.batch_size or len(outputs)
        batches = trainer.num_val_batches[dataloader_idx]  # infinite if the loader has no length
        before_last = int(batches) - 1 if math.isfinite(batches) else 0
        last = before_last * size or size - 1  # the last batch may be smaller
        shown = torch.from_numpy(spaced_evenly(last + 1, self.images)) - batch_idx * size
        shown = shown[(shown >= 0) & (shown < len(outputs))].to(outputs.device)
        if len(shown):
            self.pairs.append(torch.stack([batch.images[shown], outputs[shown]]) / 2 + 0.5)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs images and codes. Lightning calls callbacks before the module, which then resets its counts."""
        assert isinstance(pl_module, LitTokenizer)
        if trainer.sanity_checking:
            return
        if self.pairs:
            pairs = torch.cat(self.pairs, dim=1)
            log_image(trainer, "reconstructions", image_grid(pairs.flatten(0, 1), pairs.shape[1]))
        names = pl_module.tokenizer.config.schedule.names
        log_codes(trainer, "encoded_codes", pl_module.usage["val"], names)
