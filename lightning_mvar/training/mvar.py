"""Teacher-forced training of a scale-by-scale network on tokens (M-VAR, arXiv 2411.10433, section 4; VAR's recipe)."""

from __future__ import annotations

import os.path
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mvar.checkpoints import WhichWeights, load_tokenizer
from lightning_mvar.checkpoints.pair import check_pair
from lightning_mvar.checkpoints.power_ema import check_sigma_rel, power_decay
from lightning_mvar.checkpoints.training import (
    EMA_PREFIX,
    NETWORK_KEY,
    NETWORK_PREFIX,
    POWER_PREFIX,
    NetworkRecord,
    RunRecord,
    TokenizerRecord,
    open_part,
    read_plain_part,
    read_record,
    resolve_last,
)
from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.devices import exact_float32
from lightning_mvar.errors import InputError
from lightning_mvar.io.json_files import checked
from lightning_mvar.models.config import OF_TOKENS, MVARConfig, NetworkOptions
from lightning_mvar.models.mvar import MVAR, Block, Revealed
from lightning_mvar.models.parameters import UNDECAYED
from lightning_mvar.sampling.generate import draw_images, teacher_inputs
from lightning_mvar.sampling.guidance import load_guide
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.base import ScheduledModule, update_ema, warm_up_decay
from lightning_mvar.training.batches import global_rows, labels_of, token_batch
from lightning_mvar.training.blocks import ActivationCheckpointing, configure_block
from lightning_mvar.training.collectives import mean_over_ranks
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.freezing import freeze_parameters
from lightning_mvar.training.lightning_internals import attached_trainer
from lightning_mvar.training.objectives import Objective, TeacherForced, mean_scores
from lightning_mvar.training.optim import OptimizerConfig
from lightning_mvar.training.references import Reference, require_same_reference
from lightning_mvar.training.resuming import (
    adapt_to_devices,
    require_same_average,
    require_same_frozen,
    require_same_network,
    require_same_optimizer,
    require_same_power_ema,
)
from lightning_mvar.training.strategies import FSDP2Strategy, build_network, sampling_mode
from lightning_mvar.training.weights import InitialWeights, Start, check_tokenizer


class LitMVAR(ScheduledModule):
    """Trains an M-VAR or VAR network: by default on cross entropy per token, averaged over all scales.

    The tokenizer is frozen. It is held outside the module's registry, so it is neither trained nor sharded nor saved;
    a checkpoint records its path and fingerprint. The trainer calls `configure_model` once it knows the devices, which
    builds the network, sharded block by block if the strategy is `fsdp2`.

    Args:
        network: architecture of the network; what it leaves out, `weights`, the tokenizer and the token shards say;
            without `weights`, the default is d16.
        tokenizer: folder of the tokenizer that encoded the tokens; that of `weights` if not given.
        optimizer: the optimizer and its schedules.
        objective: what to minimize, a class of `lightning_mvar.training.objectives`; overlays in configs/objective.
        label_drop: share of the training labels replaced by the unconditional class.
        ema_decay: keep an exponential moving average of the weights and sample from it. Each step keeps this share of
            the average (in the first steps at most (1 + step) / (10 + step), counted from 0). 0.9999 is usual; null
            keeps no average.
        power_ema: keep a power-function average of each of these relative widths too, 0.05 and 0.10 for example (EDM2,
            arXiv 2312.02696). From several checkpoints, `merge --ema` computes the average of any other width. Each
            average takes as much memory as the network's weights.
        compile: compile each block with torch.compile.
        activation_checkpointing: what each block keeps for the backward pass, which computes the rest again: everything
            (none), its input and the outputs of linear layers, attention and scans (selective), or only its input
            (full; a third more time).
        max_skipped_steps: number of consecutive steps with gradients that are not finite that ends training.
        weights: trained network to start from: a folder of `export`, a checkpoint of `fit`, or a file of published
            weights. Its classes and scale schedule may be others; see `InitialWeights`.
        weights_kind: of a checkpoint, `ema` takes the averaged weights if it has them, `raw` the last ones.
        freeze: patterns of names of parameters that keep their values. A later one wins, and !PATTERN excepts names:
            ["*_embed*"] freezes the embeddings, ["blocks.[0-3].*"] the first four blocks, ["*", "!*.mixers.*"] all
            but the mixers.
    """

    undecayed = UNDECAYED

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
        super().__init__(optimizer, max_skipped_steps)
        if not 0 <= label_drop <= 1:
            raise InputError(f"model.label_drop must be in [0, 1], got {label_drop}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise InputError(f"model.ema_decay must be in [0, 1), got {ema_decay}")
        self.power_ema = power_ema or []
        for sigma_rel in self.power_ema:
            check_sigma_rel(sigma_rel, "model.power_ema")
        self.network_options: MVARConfig = network
        self.given_tokenizer = None if tokenizer is None else os.path.expanduser(tokenizer)
        self.weights, self.start, self.freeze_patterns = weights, Start(weights, weights_kind), freeze
        self.objective, self.label_drop, self.ema_decay = objective, label_drop, ema_decay
        self.compile_blocks, self.activation_checkpointing = compile, activation_checkpointing
        self.sampling = SamplingSettings()  # of `predict_step`
        self.predicted = 0  # images that this rank has drawn since `predict` began
        self.hidden_guide: list[MVAR | None] = [None]  # of `sampling`, hidden from the module registry
        self.known_class_names: list[str] = []
        self.reference: Reference | None = None  # of the objective
        self.network: MVAR
        self.ema: MVAR | None = None
        self.power_averages = nn.ModuleList()  # in the order of `power_ema`

    def setup(self, stage: str) -> None:
        """Checks that the datamodule's shards match the network, and the classes of the checkpoint it is from, if any.

        Raises:
            InputError: naming the first field that differs.
        """
        super().setup(stage)
        self.start.share(self.trainer.strategy)
        network, data, stored = self.network_config, self.token_data, self.start.stored
        if stored is not None:
            check_tokenizer(stored, self.hidden_tokenizer[0], self.tokenizer_path)
            if data is None and network.num_classes == stored.config.num_classes:
                self.known_class_names = stored.class_names
        if data is not None:
            data.check_network(network, self.tokenizer_fingerprint)
            data.check_classes(self.known_class_names)
        self.objective.check(network)
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

    @cached_property
    def network_config(self) -> MVARConfig:
        """Configuration of the network; known once the datamodule has read its shards.

        Raises:
            InputError: if neither the options nor shards tell the number of classes.
        """
        options = self.network_options
        if not isinstance(options, NetworkOptions):
            return options
        tokenizer, base = self.hidden_tokenizer[0].config, self.start.config
        known = {"schedule": tokenizer.schedule, "vocab_size": tokenizer.vocab_size, "code_dim": tokenizer.code_dim}
        if options.num_classes is None and self.token_data is not None:
            known["num_classes"] = len(self.class_names)
        elif options.num_classes is None and base is None:
            raise InputError("set network.num_classes: without token shards it is unknown")
        return options.complete(base, **known)

    @cached_property
    def tokenizer_path(self) -> str:
        """Folder of the tokenizer.

        Raises:
            InputError: if it is neither given nor known from the weights to start from.
        """
        if (folder := self.given_tokenizer or self.start.tokenizer_folder) is not None:
            return folder
        source = "" if self.weights is None else f": {self.weights} does not say which one it was trained with"
        raise InputError(f"set model.tokenizer to the folder of the tokenizer that encoded the tokens{source}")

    @property
    def token_data(self) -> TokenDataModule | None:
        """The datamodule, unless the data are DataLoaders or another datamodule."""
        return self.data if isinstance(self.data, TokenDataModule) else None

    @property
    def class_names(self) -> list[str]:
        """Class names in label order, from the shards or the checkpoint; without either, the labels themselves."""
        if self.token_data is not None:
            return self.token_data.class_names
        return self.known_class_names or [str(label) for label in range(self.network_config.num_classes)]

    def configure_model(self) -> None:
        """Builds the network and its averages, sharding each part as soon as it exists; see `build_network`."""
        if self.reference is not None:
            self.reference.build()
        if hasattr(self, "network"):
            return
        strategy = None if (trainer := attached_trainer(self)) is None else trainer.strategy
        device = self.device if strategy is None else strategy.root_device
        shard = strategy.shard if isinstance(strategy, FSDP2Strategy) else lambda part: None
        config, stored = self.network_config, self.start.stored
        load = None if stored is None else InitialWeights(stored, config, self.class_names).load

        def finish(part: nn.Module) -> None:
            self.configure_block(part)
            shard(part)

        def average() -> MVAR:  # the same seed makes it start as a copy
            return build_network(config, device, self.seed, shard, load).requires_grad_(False)

        self.network = build_network(config, device, self.seed, finish, load, self.freeze_patterns)
        self.ema = None if self.ema_decay is None else average()
        self.power_averages.extend(average() for _ in self.power_ema)

    def configure_block(self, part: nn.Module) -> None:
        if isinstance(part, Block):
            configure_block(part, self.compile_blocks, self.activation_checkpointing)

    @property
    def averaged(self) -> MVAR:
        """The network to sample from: the weight average if one is kept, else the weights being trained."""
        return self.network if self.ema is None else self.ema

    def after_step(self) -> None:
        if self.ema is not None and self.ema_decay is not None:
            update_ema(self.ema, self.network, warm_up_decay(self.ema_decay, self.global_step), self.gradients_finite)
        for average, sigma_rel in zip(self.power_averages, self.power_ema, strict=True):
            update_ema(average, self.network, power_decay(sigma_rel, self.global_step + 1), self.gradients_finite)

    @cached_property
    def hidden_tokenizer(self) -> list[Tokenizer]:
        """The tokenizer, in a list that hides it from the module registry."""
        tokenizer = load_tokenizer(self.tokenizer_path).requires_grad_(False)
        check_pair(self.network_options, tokenizer.config, f"the tokenizer in {self.tokenizer_path}")
        return [tokenizer]

    @property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer, on the device of the network."""
        tokenizer = self.hidden_tokenizer[0]
        if tokenizer.quantizer.codebook.weight.device != self.device:
            tokenizer.to(self.device)
        return tokenizer

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        return self.hidden_tokenizer[0].fingerprint()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Accepts batches of any DataLoader; see `token_batch` and `labels_of`."""
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
        return loss * (1 + 0 * loss.detach())  # if the loss is not finite, neither is any gradient, on all ranks

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
            The weaker network that guides, on the device of the strategy; None if none does. A scorer of drafts stays
            in the cache of `Drafts.load_scorer`.

        Raises:
            InputError: if the settings do not suit the network and its tokenizer, or a named network cannot be read.
        """
        tokenizer = self.tokenizer.to(self.trainer.strategy.root_device)
        settings.check(self.network_config)
        settings.choice.load_scorer(tokenizer.quantizer)
        return load_guide(settings.guide, self.network_config, tokenizer, self.class_names)

    def predict_step(self, labels: Tensor, batch_idx: int) -> Tensor:
        """Draws an image (3, H, W) in [0, 1] per label (b,), maybe none, with the settings in `self.sampling`.

        Image i of a seed is the same in any batch and on any number of ranks, if a DistributedSampler without shuffling
        divides the labels.
        """
        drawn = labels if len(labels) else labels.new_zeros(1)  # a sharded network needs all ranks in each forward pass
        numbers = range(self.predicted, self.predicted + len(drawn))
        keys = self.sampling.keys(i * self.trainer.world_size + self.global_rank for i in numbers)
        self.predicted += len(labels)
        with sampling_mode(self.averaged, self.trainer.strategy) as network:
            images, _ = draw_images(network, self.tokenizer, drawn, self.sampling, keys, guide=self.hidden_guide[0])
            return images[: len(labels)]

    def evaluate(self, batch: TokenBatch, stage: str) -> None:
        """Logs teacher-forced scores of a batch without its padding; the epoch average weights every sample equally."""
        weight = batch.valid.sum()  # on the device, which the host does not wait for; 0 for a batch of only padding
        factors = batch.valid * (len(batch.valid) / weight.clamp(min=1))  # a mean over all rows is one over valid ones
        losses, correct = (scores * factors[:, None] for scores in self.score(batch, batch.labels))
        means = mean_scores(stage, losses, correct, self.network_config.schedule)
        self.log_dict(means, batch_size=weight, sync_dist=True)  # type: ignore[arg-type]

    def score(
        self, batch: TokenBatch, labels: Tensor, label_smoothing: float = 0.0, revealed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns cross entropy (b, l) in nats and whether the most likely token is correct (b, l), both float32.

        The network reads tokens that are revealed (b, l) bool; none by default.
        """
        inputs, tokens = self.teacher_inputs(batch.tokens), batch.tokens
        read = None if revealed is None else Revealed(self.tokenizer.quantizer.codebook(tokens), revealed)
        scores: tuple[Tensor, Tensor] = self.network.score(labels, inputs, tokens, label_smoothing, read)
        return scores

    def teacher_inputs(self, tokens: Tensor) -> Tensor:
        """Returns the network's inputs for tokens (b, l), computed in float32 as in sampling."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), exact_float32():
            return teacher_inputs(self.network_config, self.tokenizer, tokens)

    def drop_labels(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Returns the labels (b,) of a batch with a share of them replaced by the unconditional class.

        Draws for the global batch from (seed, epoch, batch) and uses this rank's part, so neither the number of ranks
        nor an interruption changes which labels are dropped.
        """
        generator = torch.Generator().manual_seed(self.derive_seed(batch_idx, "label drop"))
        draws = torch.rand(self.trainer.world_size * len(batch.labels), generator=generator)
        dropped = draws[global_rows(batch, self.global_rank, self.trainer.world_size)] < self.label_drop
        dropped = dropped.to(batch.labels.device, non_blocking=True)
        return batch.labels.masked_fill(dropped, self.network_config.num_classes)

    def image_keys(self, batch: TokenBatch, batch_idx: int, purpose: str) -> Tensor:
        """Returns the key (b, 2) of each image's random numbers, on the device; see `sampling.philox.uniform`.

        Depends on (seed, epoch, batch), the purpose and the image's place in the global batch alone.
        """
        rows = global_rows(batch, self.global_rank, self.trainer.world_size)
        keys = image_keys(self.derive_seed(batch_idx, purpose), rows)
        return keys.to(self.device, non_blocking=True)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, tokenizer: str | None = None, **options: Any
    ) -> LitMVAR:
        """Builds the module of a checkpoint of `fit`, sharded or not, with its weights and their average.

        To continue a run that started from `weights`, fit this module with the same checkpoint: it needs no `weights`.

        Args:
            checkpoint_path: the checkpoint.
            map_location: device to move the module to.
            tokenizer: folder of the tokenizer, if it has moved.
            options: other arguments of the constructor, for training on: a checkpoint has none but the network, and the
                decays of its averages, if it keeps any.

        Raises:
            InputError: if the checkpoint is missing or not one of `fit`, its tokenizer is a different one, or it is of
                an older version that did not record the decay of its average.
        """
        path = resolve_last(Path(checkpoint_path).expanduser())
        record = read_record(path, read_plain_part(path))
        if record.run.ema and record.run.ema_decay is None and "ema_decay" not in options:
            raise InputError(f"{path} does not record the decay of its weight average: pass ema_decay")
        options = {"ema_decay": record.run.ema_decay, "power_ema": record.run.power_ema} | options
        module = cls(NetworkOptions(**vars(record.network)), tokenizer or record.tokenizer.path, **options)
        require_same_power_ema(record.run.power_ema, module.power_ema)
        module.known_class_names = record.class_names

        def load(prefix: str) -> MVAR:
            return open_part(path, record, prefix, tokenizer).load().network.requires_grad_(False)

        module.network = load(NETWORK_PREFIX).train()
        freeze_parameters(module.network, module.freeze_patterns)
        module.network.blocks.apply(module.configure_block)
        if module.ema_decay is not None:
            module.ema = load(EMA_PREFIX if record.run.ema else NETWORK_PREFIX)
        module.power_averages.extend(load(f"{POWER_PREFIX}{i}.") for i in range(len(module.power_ema)))
        return module.to(map_location) if map_location is not None else module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tokenizer = TokenizerRecord(str(Path(self.tokenizer_path).resolve()), self.tokenizer_fingerprint)
        batch = None if self.token_data is None else self.batch_of_all_ranks
        reference = None if self.reference is None else self.reference.record
        run = RunRecord(
            ema=self.ema_decay is not None,
            skipped_steps=self.skip_counts,
            world_size=self.trainer.world_size,
            batch_of_all_ranks=batch,
            ema_decay=self.ema_decay,
            reference=reference,
            power_ema=self.power_ema,
            muon=self.optimizer_config.muon,
            freeze=[*self.freeze_patterns],
        )
        checkpoint[NETWORK_KEY] = asdict(NetworkRecord(self.network_config, tokenizer, self.class_names, run))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = self.check_checkpoint(checkpoint[NETWORK_KEY])
        if self.token_data is not None:
            self.token_data.check_classes(record.class_names)
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            require_same_reference(record.run.reference, None if self.reference is None else self.reference.record)
            self.skipped_steps, self.skipped_in_a_row = record.run.skipped_steps
            if self.token_data is not None:
                counts = self.trainer.world_size, self.batch_of_all_ranks
                adapt_to_devices(record.run, *counts, checkpoint["loops"]["fit_loop"])

    def check_checkpoint(self, entry: Any) -> NetworkRecord:
        """Reads the `NETWORK_KEY` entry of a checkpoint; fields that it lacks have their defaults.

        Raises:
            InputError: if it is damaged, or of another network or tokenizer; names the first field that differs.
        """
        record = checked(entry, NetworkRecord, "--ckpt_path")
        self.start.continue_from(record)
        network = self.network_options if attached_trainer(self) is None else self.network_config
        if isinstance(network, NetworkOptions):  # what tokenizer and shards say is known with the trainer
            network = network.complete(self.start.config, **{name: getattr(record.network, name) for name in OF_TOKENS})
        require_same_network(record, network, self.tokenizer_fingerprint)
        require_same_average(record.run.ema, self.ema_decay is not None)
        require_same_power_ema(record.run.power_ema, self.power_ema)
        require_same_optimizer(record.run.muon, self.optimizer_config.muon)
        require_same_frozen(record.run.freeze, [*self.freeze_patterns])
        return record
