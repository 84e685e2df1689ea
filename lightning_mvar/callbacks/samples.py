"""What TensorBoard shows of each validation: samples, how they form scale by scale, reconstructions, codes in use."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_mvar.callbacks.tensorboard import log_codes, log_image
from lightning_mvar.data.classes import Classes
from lightning_mvar.data.images.examples import ImageBatch
from lightning_mvar.sampling.generate import generate, image_generators
from lightning_mvar.sampling.grids import formation_strip, image_grid, with_row_names
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.strategies import sampling_from
from lightning_mvar.training.tokenizer import LitTokenizer


class SamplesCallback(L.Callback):
    """After every validation: `samples`, a named row for each class, and `strip`, what each scale adds to some images.

    Drawn from the average of the weights, where one is kept. How often each code was drawn is shown as histograms:
    `sampled_codes/K` at the scale named K, `sampled_codes/all` at any.

    Args:
        classes: number of classes to show, spread evenly over all of them.
        per_class: images in each row of the grid.
        guidance, top_k, top_p: of the sampling.
        seed: of the sampling; the same from step to step, so that one sees the same image improve.
        keep_sharded: gather a sharded network block by block, if the whole does not fit on a device; slower.
    """

    def __init__(
        self,
        classes: int = 10,
        per_class: int = 8,
        guidance: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int = 0,
        keep_sharded: bool = False,
    ) -> None:
        self.classes, self.per_class, self.seed, self.keep_sharded = classes, per_class, seed, keep_sharded
        self.sampling: dict[str, Any] = {"guidance": guidance, "top_k": top_k, "top_p": top_p}

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, LitMVAR)
        total = pl_module.network_config.num_classes
        shown = torch.linspace(0, total - 1, min(self.classes, total)).long()
        labels = shown.repeat_interleave(self.per_class).to(pl_module.device)
        generators = image_generators(self.seed, range(len(labels)))
        # On every rank alike: a sharded network needs all of them for a forward.
        with sampling_from(pl_module.averaged, trainer.strategy, self.keep_sharded) as network:
            images, tokens = generate(
                network, pl_module.tokenizer, labels, generator=generators, return_tokens=True, **self.sampling
            )
        classes = Classes(pl_module.class_names, total)
        names = [classes.name(label) for label in shown.tolist()]
        log_image(trainer, "samples", with_row_names(image_grid(images, self.per_class), names))
        steps = pl_module.tokenizer.decode_steps(tokens[:: self.per_class])
        log_image(trainer, "strip", with_row_names(formation_strip(step / 2 + 0.5 for step in steps), names))
        scales = pl_module.per_scale(tokens)
        counts = [scale.flatten().bincount(minlength=pl_module.network_config.vocab_size) for scale in scales]
        log_codes(trainer, "sampled_codes", torch.stack(counts), pl_module.network_config.schedule.names)


class ReconstructionsCallback(L.Callback):
    """After every validation: `reconstructions`, rows of originals above rows of what the tokenizer makes of them.

    Histograms `encoded_codes/K` and `encoded_codes/all` show how often each code was chosen for the validation images
    of the first rank.

    Args:
        images: number of images, the first of the validation set.
    """

    def __init__(self, images: int = 16) -> None:
        self.images = images

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
        if trainer.sanity_checking or batch_idx > 0 or not isinstance(outputs, Tensor):
            return
        originals = batch.images[: self.images]
        pairs = torch.cat([originals, outputs[: self.images]]) / 2 + 0.5
        log_image(trainer, "reconstructions", image_grid(pairs, len(originals)))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning asks callbacks before the module, which then forgets what it has counted."""
        assert isinstance(pl_module, LitTokenizer)
        if not trainer.sanity_checking:
            names = pl_module.tokenizer.config.schedule.names
            log_codes(trainer, "encoded_codes", pl_module.usage["val"], names)
