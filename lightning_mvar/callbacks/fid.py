"""Scores of samples, computed while a network trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from tqdm import tqdm

from lightning_mvar.callbacks.interruption import end_if_asked
from lightning_mvar.checkpoints import WhichWeights
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.reference import load_reference
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Summary, prepare
from lightning_mvar.sampling.generate import generate, image_generators
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.strategies import sampling_from


class FIDCallback(L.Callback):
    """Samples at the end of validation and of training, and logs how the samples compare with real images.

    Logged are `val/fid`, and where extractor and reference allow `val/sfid`, `val/is`, `val/precision` and
    `val/recall`, to choose models by. `val/frechet_EXTRACTOR` is `val/fid` under a name that says what it is comparable
    with: published FID only if the extractor is InceptionV3.

    Every rank samples the same number of batches; image i is the same whatever the number of ranks and the batch size.

    Args:
        extractor: `nn.Module` with `num_features`, images (b, 3, H, W) in [0, 1] -> (b, num_features).
        reference: the real images: `digits:test`, `photos:test`, a folder of class folders, an npz with mu and sigma
            or with images, or a folder of token shards.
        num_samples: images to sample, classes in turn.
        batch_size: images sampled at once on each rank.
        every_n_steps: skip validations until so many steps after the last that was scored.
        every_n_epochs: the same in epochs. Where neither is given, every validation is scored; the last always is.
        weights: `ema` for the average where one is kept, `raw` for the weights as they are.
        keep_sharded: gather a sharded network block by block, if the whole does not fit on a device; slower.
        neighbours: k of precision and recall; 0 for neither.
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
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        weights: WhichWeights = "ema",
        keep_sharded: bool = False,
        neighbours: int = 3,
        guidance: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int = 0,
        cache: str = "outputs/statistics",
    ) -> None:
        if num_samples <= max(neighbours, 1) or batch_size < 1:
            raise InputError("the FID callback needs num_samples > max(neighbours, 1) and batch_size >= 1")
        for name, every in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if every is not None and every < 1:
                raise InputError(f"{name} of the FID callback must be at least 1, got {every}")
        self.extractor, self.source, self.cache = extractor, reference, Path(cache)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.weights, self.keep_sharded, self.neighbours = weights, keep_sharded, neighbours
        self.sampling: dict[str, Any] = {"guidance": guidance, "top_k": top_k, "top_p": top_p}
        self.scored = {"step": 0, "epoch": 0}  # what was complete when samples were last scored
        self.reference: Summary | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the real images before any training is spent."""
        self.measure_reference(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.reference is None:  # outside of `fit`
            self.measure_reference(trainer, pl_module)

    def measure_reference(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitMVAR)
        tokenizer = pl_module.tokenizer.to(trainer.strategy.root_device)
        prepare(self.extractor, trainer.strategy.root_device)
        self.reference = load_reference(
            self.extractor, self.source, tokenizer.config.shape, self.cache, self.neighbours > 0, tokenizer
        )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and self.is_due(trainer):
            pl_module.log_dict(self.score(trainer, pl_module), sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where training does not end with a validation; too late for `self.log`."""
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
        """Sample and score; all ranks together."""
        assert isinstance(pl_module, LitMVAR)
        assert self.reference is not None
        begin = time.perf_counter()
        scores = Scores(self.extractor, self.reference, self.num_samples, self.neighbours)
        self.sample_into(scores, trainer, pl_module)
        found = scores.compute()
        self.scored = {"step": trainer.global_step, "epoch": epochs_done(trainer)}
        logged = {f"val/{name}": value for name, value in found.items()}
        logged[f"val/frechet_{type(self.extractor).__name__}"] = found["fid"]
        return logged | {"perf/fid_s": time.perf_counter() - begin}

    def sample_into(self, scores: Scores, trainer: L.Trainer, pl_module: LitMVAR) -> None:
        """Hand this rank's share of the samples to `scores`."""
        classes = pl_module.network_config.num_classes
        stride = self.batch_size * trainer.world_size
        chosen = pl_module.averaged if self.weights == "ema" else pl_module.network
        rounds = range(0, self.num_samples, stride)
        quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
        with sampling_from(chosen, trainer.strategy, self.keep_sharded) as network:
            for begin in tqdm(rounds, desc="samples", leave=False, disable=quiet):
                end_if_asked(trainer)
                first = begin + trainer.global_rank * self.batch_size
                numbers = torch.arange(first, first + self.batch_size, device=pl_module.device)
                generators = image_generators(self.seed, range(first, first + self.batch_size))
                images = generate(
                    network, pl_module.tokenizer, numbers % classes, generator=generators, **self.sampling
                )
                wanted = numbers < self.num_samples  # the rest fills up an equal last batch
                scores.update(images[wanted].float(), numbers[wanted])

    def state_dict(self) -> dict[str, Any]:
        return {"scored": self.scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scored = state_dict["scored"]


def epochs_done(trainer: L.Trainer) -> int:
    return trainer.current_epoch + int(trainer.is_last_batch)
