"""Scores of a tokenizer's reconstructions during its training."""

from __future__ import annotations

import lightning as L
from torch import Tensor, nn

from lightning_mvar.data.images.examples import ImageBatch
from lightning_mvar.metrics.reconstruction import ReconstructionScores
from lightning_mvar.metrics.summary import prepare


class ReconstructionScoresCallback(L.Callback):
    """Logs the scores of `lightning-mvar reconstruct` on the validation images: `val/psnr` in dB and `val/ssim`.

    With an extractor, also logs `val/rfid`, the Frechet distance between originals and reconstructions, and repeats it
    as `val/frechet_EXTRACTOR`, which shows what it is comparable with: published rFID only if that is InceptionV3.

    Args:
        extractor: `nn.Module` with `num_features`, images (b, 3, H, W) in [0, 1] -> (b, num_features).
    """

    def __init__(self, extractor: nn.Module | None = None) -> None:
        self.extractor = extractor
        self.scores: ReconstructionScores | None = None  # of the current validation

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prepares the extractor, which may itself have to be trained, before training starts."""
        if self.extractor is not None:
            prepare(self.extractor, pl_module.device)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.extractor is not None:
            prepare(self.extractor, pl_module.device)
        self.scores = ReconstructionScores(self.extractor, pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.scores is not None and isinstance(outputs, Tensor):
            self.scores.update(batch.images / 2 + 0.5, outputs / 2 + 0.5)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.scores is None:
            return
        scores = {f"val/{name}": value for name, value in self.scores.compute().items()}
        if self.extractor is not None:
            scores[f"val/frechet_{type(self.extractor).__name__}"] = scores["val/rfid"]
        for name, value in scores.items():
            pl_module.log(name, value, prog_bar=name == "val/psnr", sync_dist=True)
        self.scores = None
