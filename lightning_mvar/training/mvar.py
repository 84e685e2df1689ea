"""Teacher-forced training of a scale-by-scale network on tokens (M-VAR, arXiv 2411.10433, section 4; VAR's recipe)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mvar.checkpoints import WhichWeights
from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.devices import exact_float32, without_autocast
from lightning_mvar.errors import require_in
from lightning_mvar.models.config import NetworkOptions
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.sampling.generate import draw_images, teacher_inputs
from lightning_mvar.sampling.guidance import load_guide
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.training.batches import global_rows, labels_of, token_batch
from lightning_mvar.training.blocks import ActivationCheckpointing
from lightning_mvar.training.collectives import mean_over_ranks
from lightning_mvar.training.network import NetworkModule
from lightning_mvar.training.objectives import Objective, TeacherForced, mean_scores
from lightning_mvar.training.optim import OptimizerConfig
from lightning_mvar.training.references import Reference
from lightning_mvar.training.strategies import sampling_mode


class LitMVAR(NetworkModule):
    """Trains an M-VAR or VAR network: by default on cross entropy per token, averaged over all scales.

    `NetworkModule` holds the network and the frozen tokenizer.

    Args:
        network: architecture of the network. Fields that are left out are taken from `weights`, the tokenizer and the
            token shards; without `weights`, the default is d16.
        tokenizer: folder, published file or name of the tokenizer that encoded the tokens; the tokenizer of `weights`
            if not given.
        optimizer: the optimizer and its schedules.
        objective: what to minimize, a class in `lightning_mvar.training.objectives`; see configs/objective.
        label_drop: share of the training labels replaced by the unconditional class.
        ema_decay: decay of an exponential moving average of the weights, which is used for sampling (in the first steps
            at most (1 + step) / (10 + step), with steps counted from 0). 0.9999 is usual; null keeps no average.
        power_ema: relative widths of additional power-function averages, for example 0.05 and 0.10 (EDM2, arXiv
            2312.02696). From several checkpoints, `merge --ema` computes the average of any other width. Each average
            takes as much memory as the network's weights.
        compile: compile each block with torch.compile.
        activation_checkpointing: what each block keeps for the backward pass, which recomputes the rest: everything
            (none), its input and the outputs of linear layers, attention and scans (selective), or only its input
            (full; takes a third more time).
        max_skipped_steps: number of consecutive steps with gradients that are not finite after which training stops.
        weights: trained network to start from: a folder of `export`, a checkpoint of `fit`, or a file of published
            weights. Its classes and scale schedule may differ; see `InitialWeights`.
        weights_kind: for a checkpoint, `ema` uses the averaged weights if it has them, `raw` the last ones.
        freeze: name patterns of parameters to freeze. Later patterns take precedence, and !PATTERN unfreezes:
            ["*_embed*"] freezes the embeddings, ["blocks.[0-3].*"] the first four blocks, ["*", "!*.mixers.*"] all
            but the mixers.
    """

    def __init__(
        self,
        network: NetworkOptions = NetworkOptions(),  # noqa: B008 (frozen)
        tokenizer: str | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        label_drop: float = 0.1,
        ema_decay: float | None = None,
        power_ema: list[float] | None = None,
        compile: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
        max_skipped_steps: int = 20,
        objective: Objective = TeacherForced(),  # noqa: B008 (never changes)
        weights: str | None = None,
        weights_kind: WhichWeights = "ema",
        freeze: tuple[str, ...] = (),
    ) -> None:
        super().__init__(
            network=network,
            tokenizer=tokenizer,
            optimizer=optimizer,
            ema_decay=ema_decay,
            power_ema=power_ema,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            max_skipped_steps=max_skipped_steps,
            weights=weights,
            weights_kind=weights_kind,
            freeze=freeze,
        )
        require_in("[0, 1]", "model.", label_drop=label_drop)
        self.objective, self.label_drop = objective, label_drop
        self.sampling = SamplingSettings()  # for `predict_step`
        self.predicted = 0  # images that this rank has drawn since `predict` began
        self.hidden_guide: list[MVAR | None] = [None]  # guide for `sampling`, hidden from the module registry

    def setup(self, stage: str) -> None:
        """Also checks the objective and opens its reference network, if any; see `NetworkModule.setup`.

        Raises:
            InputError: if the shards or the objective do not fit the network.
        """
        super().setup(stage)
        self.objective.check(self.network_config)
        if stage == "fit":
            self.setup_objective()

    def setup_objective(self) -> None:
        """Opens the objective's reference network, if it has one, and checks the objective against the data."""
        data, path = self.token_data, self.objective.reference_path(self.weights)
        if data is not None:
            self.objective.check_own_samples("own" in data.shards)
        if path is not None:
            context = self.hidden_tokenizer[0], self.tokenizer_path, self.trainer.strategy
            self.reference = Reference(path, self.start.kind, self.network_config, self.class_names, *context)
            if data is not None and "own" in data.shards:
                self.reference.check_samples(data.manifests["own"], data.shards["own"])

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Accepts batches from any DataLoader; see `token_batch` and `labels_of`."""
        if self.trainer.predicting:
            return labels_of(batch, self.network_config.num_classes)
        return token_batch(batch, self.network_config)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        labels = self.drop_labels(batch, batch_idx)
        loss, losses, correct, scalars = self.objective(self, batch, labels, batch_idx)
        if self.is_logging_step:
            scores = mean_scores("train", losses.detach(), correct, self.network_config.schedule)
            scores |= {"train/loss": loss.detach()} | {f"train/{name}": value for name, value in scalars.items()}
            means = mean_over_ranks(torch.stack([*scores.values()]))
            self.log_scalars(dict(zip(scores, means, strict=True)))
        return loss * (1 + 0 * loss.detach())  # if the loss is not finite, no gradient is finite on any rank

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def on_predict_start(self) -> None:
        self.predicted = 0
        self.hidden_guide = [self.prepare_sampling(self.sampling)]

    def prepare_sampling(self, settings: SamplingSettings) -> MVAR | None:
        """Checks sampling settings and loads the networks that they name, before the first image is drawn.

        Returns:
            The guiding network on the strategy's device; None if there is none. A scorer of drafts stays in the cache
            of `Drafts.load_scorer`.

        Raises:
            InputError: if the settings do not fit the network and its tokenizer, or a named network cannot be read.
        """
        tokenizer = self.tokenizer.to(self.trainer.strategy.root_device)
        settings.check(self.network_config)
        settings.choice.load_scorer(tokenizer.quantizer)
        return load_guide(settings.guide, self.network_config, tokenizer, self.class_names)

    def predict_step(self, labels: Tensor, batch_idx: int) -> Tensor:
        """Draws images (b, 3, H, W) in [0, 1], one per label (b,), with the settings in `self.sampling`; b may be 0.

        Image i of a seed is the same in any batch and on any number of ranks, provided that a DistributedSampler
        without shuffling divides the labels.
        """
        drawn = labels if len(labels) else labels.new_zeros(1)  # a sharded network needs all ranks in each forward pass
        numbers = range(self.predicted, self.predicted + len(drawn))
        keys = self.sampling.keys(i * self.trainer.world_size + self.global_rank for i in numbers)
        self.predicted += len(labels)
        with sampling_mode(self.averaged, self.trainer.strategy) as network:
            images, _ = draw_images(network, self.tokenizer, drawn, self.sampling, keys, guide=self.hidden_guide[0])
            return images[: len(labels)]

    def evaluate(self, batch: TokenBatch, stage: str) -> None:
        """Logs teacher-forced scores of a batch without its padding; the epoch average weights all samples equally."""
        weight = batch.valid.sum()  # stays on the device; 0 if the batch is only padding
        factors = batch.valid * (len(batch.valid) / weight.clamp(min=1))  # turn means over all rows into valid means
        losses, correct = (scores * factors[:, None] for scores in self.score(batch, batch.labels))
        means = mean_scores(stage, losses, correct, self.network_config.schedule)
        for name, value in means.items():
            self.log(name, value, prog_bar=name == "val/loss", batch_size=weight, sync_dist=True)

    def score(self, batch: TokenBatch, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns cross entropy (b, l) in nats, and 1 where the most likely token is correct (b, l); both float32."""
        inputs = self.teacher_inputs(batch.tokens)
        scores: tuple[Tensor, Tensor] = self.network.score(labels, inputs, batch.tokens, label_smoothing)
        return scores

    def teacher_inputs(self, tokens: Tensor) -> Tensor:
        """Returns the network's inputs for tokens (b, l), computed in float32 as in sampling."""
        with torch.no_grad(), without_autocast(tokens), exact_float32():
            return teacher_inputs(self.network_config, self.tokenizer, tokens)

    def drop_labels(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Returns the labels (b,) of a batch, with a share of them replaced by the unconditional class.

        The draws are made for the global batch from (seed, epoch, batch), and this rank uses its part, so neither the
        number of ranks nor an interruption changes which labels are dropped.
        """
        generator = torch.Generator().manual_seed(self.derive_seed(batch_idx, "label drop"))
        draws = torch.rand(self.trainer.world_size * len(batch.labels), generator=generator)
        dropped = draws[global_rows(batch, self.global_rank, self.trainer.world_size)] < self.label_drop
        dropped = dropped.to(batch.labels.device, non_blocking=True)
        return batch.labels.masked_fill(dropped, self.network_config.num_classes)

    def image_keys(self, batch: TokenBatch, batch_idx: int, purpose: str) -> Tensor:
        """Returns the key (b, 2) of each image's random numbers, on the device; see `sampling.philox.uniform`.

        A key depends only on (seed, epoch, batch), `purpose` and the image's position in the global batch.
        """
        rows = global_rows(batch, self.global_rank, self.trainer.world_size)
        keys = image_keys(self.derive_seed(batch_idx, purpose), rows)
        return keys.to(self.device, non_blocking=True)
