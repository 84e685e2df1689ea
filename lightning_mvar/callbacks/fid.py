"""Scores of samples during training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from tqdm import tqdm

from lightning_mvar.callbacks.interruption import raise_if_interrupted
from lightning_mvar.checkpoints import WhichWeights
from lightning_mvar.data.images.protocols import MARGIN, CropProtocol
from lightning_mvar.devices import without_autocast
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.metrics.precision_recall import DENSITY_NEIGHBORS
from lightning_mvar.metrics.reference import open_reference
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Summary, prepare
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.sampling.generate import draw_images, max_batch_size
from lightning_mvar.sampling.graphs import graphs_for
from lightning_mvar.sampling.sampler import require_finite
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.strategies import sampling_mode


class FIDCallback(L.Callback):
    """Samples at the end of validation and of training, and logs scores of the samples against real images.

    Logs `val/fid` and, if extractor and reference support them, `val/mind`, `val/kid` and the other scores of `Scores`,
    for model selection; MIND needs the fewest samples (docs/scores.md). `val/frechet_EXTRACTOR` repeats `val/fid` under
    a name that shows what it is comparable with: published FID only if the extractor is InceptionV3.

    Each rank samples the same number of batches; image i does not depend on the number of ranks or the batch size.

    Args:
        extractor: `nn.Module` with `num_features`, images (b, 3, H, W) in [0, 1] -> (b, num_features).
        reference: the real images: `digits:test`, `photos:test`, `emoji64:test`, a folder of class folders, FOLDER:val
            for its held-out images, an npz with mu and sigma or with images, or a folder of token shards.
        crop: how image files of the reference are resized and cropped; see `data.images.protocols`.
        margin: with `crop` var, ratio of the resized shorter side to the crop; default: that of the shards trained on.
        num_samples: number of images to sample, cycling through the classes.
        batch_size: images per batch and rank; reduced if their states need more than 8 GiB.
        every_n_steps: minimum number of steps between scored validations.
        every_n_epochs: minimum number of epochs between them. If neither is given, every validation is scored. The last
            one always is.
        weights: `ema` for the weight average if one is kept, `raw` for the weights being trained.
        keep_sharded: gather a sharded network block by block, if it does not fit on one device as a whole; slower.
        neighbors: k of precision and recall; 0 to skip them, density and coverage, which take the longest.
        sampling: guidance scale, top-k, top-p and seed, and the other options of `SamplingSettings`.
        cache: folder that keeps the statistics of the real images.
    """

    def __init__(
        self,
        extractor: nn.Module,
        reference: str,
        num_samples: int = 1000,
        batch_size: int = 100,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        weights: WhichWeights = "ema",
        keep_sharded: bool = False,
        neighbors: int = 3,
        sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 (frozen)
        cache: str = "outputs/statistics",
        crop: CropProtocol = "var",
        margin: float | None = None,
    ) -> None:
        bound = max(neighbors, DENSITY_NEIGHBORS) if neighbors > 0 else 1
        if num_samples <= bound or batch_size < 1:
            raise InputError(
                f"the FID callback needs num_samples > {bound} (for neighbors {neighbors}) and batch_size >= 1, got "
                f"{num_samples} and {batch_size}"
            )
        require_in("[1, inf)", "FIDCallback's ", every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        self.extractor, self.reference_name, self.cache = extractor, reference, Path(cache).expanduser()
        self.crop: CropProtocol = crop
        self.margin = margin
        self.num_samples, self.batch_size, self.sampling = num_samples, batch_size, sampling
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.weights, self.keep_sharded, self.neighbors = weights, keep_sharded, neighbors
        self.scored = {"step": 0, "epoch": 0}  # at the last scoring; epochs completed
        self.reference: Summary | None = None
        self.guide: MVAR | None = None  # a weaker network, if `sampling` names one

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.real = open_reference(self.reference_name, crop=self.crop, margin=self.reference_margin(trainer))

    def reference_margin(self, trainer: L.Trainer) -> float:
        """Returns the margin of the reference's crops: the given one, or that of the shards if the protocol has one."""
        if self.margin is not None:
            return self.margin
        data = trainer.datamodule  # type: ignore[attr-defined]
        return data.margin if self.crop == "var" and isinstance(data, TokenDataModule) else MARGIN

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the real images first, so that a bad reference, guide or scorer fails before training."""
        self.prepare_scoring(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.reference is None:  # outside of `fit`
            self.prepare_scoring(trainer, pl_module)

    def prepare_scoring(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitMVAR)
        tokenizer = pl_module.tokenizer.to(trainer.strategy.root_device)
        self.guide = pl_module.prepare_sampling(self.sampling)
        prepare(self.extractor, trainer.strategy.root_device)
        self.reference = self.real.summary(self.extractor, tokenizer.config.shape, self.cache, tokenizer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and self.is_due(trainer):
            pl_module.log_dict(self.score(trainer, pl_module), sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the last weights if training did not end with a validation. `self.log` is unavailable here."""
        if self.scored["step"] != trainer.global_step:
            scores = self.score(trainer, pl_module)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scores.items()})
            for logger in trainer.loggers:
                logger.log_metrics(scores, trainer.global_step)

    def is_due(self, trainer: L.Trainer) -> bool:
        if trainer.state.fn != "fit" or trainer.global_step == trainer.max_steps:
            return True
        steps, epochs = trainer.global_step, epochs_done(trainer)
        if epochs == trainer.max_epochs:
            return True
        by_step = self.every_n_steps and steps - self.scored["step"] >= self.every_n_steps
        by_epoch = self.every_n_epochs and epochs - self.scored["epoch"] >= self.every_n_epochs
        return bool(by_step or by_epoch or (self.every_n_steps is None and self.every_n_epochs is None))

    def score(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Samples and returns the scores by tag; all ranks must call this."""
        assert isinstance(pl_module, LitMVAR)
        assert self.reference is not None
        start = time.perf_counter()
        scores = Scores(self.extractor, self.reference, self.num_samples, self.neighbors)
        self.sample_into(scores, trainer, pl_module)
        results = scores.compute()
        self.scored = {"step": trainer.global_step, "epoch": epochs_done(trainer)}
        logged = {f"val/{name}": value for name, value in results.items()}
        logged[f"val/frechet_{type(self.extractor).__name__}"] = results["fid"]
        return logged | {"perf/fid_s": time.perf_counter() - start}

    def sample_into(self, scores: Scores, trainer: L.Trainer, pl_module: LitMVAR) -> None:
        """Feeds this rank's share of the samples to `scores`."""
        classes = pl_module.network_config.num_classes
        batch_size = min(self.batch_size, max_batch_size(pl_module.network_config))
        stride = batch_size * trainer.world_size
        weights = pl_module.averaged if self.weights == "ema" else pl_module.network
        quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
        with sampling_mode(weights, trainer.strategy, self.keep_sharded) as network:
            graphs = graphs_for(network)
            for begin in tqdm(range(0, self.num_samples, stride), desc="samples", leave=False, disable=quiet):
                raise_if_interrupted(trainer)
                first = begin + trainer.global_rank * batch_size
                ids = torch.arange(first, first + batch_size)
                keys = self.sampling.keys(ids.tolist())
                labels = ids % classes
                images, _ = draw_images(
                    network, pl_module.tokenizer, labels, self.sampling, keys, graphs=graphs, guide=self.guide
                )
                require_finite(images)
                valid = ids[ids < self.num_samples]  # the rest pads the last batch to an equal size
                with without_autocast(images):  # like the features of the reference
                    scores.update(images[: len(valid)], valid)

    def state_dict(self) -> dict[str, Any]:
        return {"scored": self.scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scored = state_dict["scored"]


def epochs_done(trainer: L.Trainer) -> int:
    return trainer.current_epoch + int(trainer.is_last_batch)
