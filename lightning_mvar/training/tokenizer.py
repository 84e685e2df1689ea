"""Training of the tokenizer: reconstruction and commitment losses, revival of unused codes (VAR, section 3.1)."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.checkpoints.training import EMA_PREFIX, read_plain_part, read_tensors, resolve_last
from lightning_mvar.data.images.examples import ImageBatch
from lightning_mvar.data.tokens.statistics import perplexity
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.json_files import checked, shown
from lightning_mvar.tokenizer.autoencoder import ResidualBlock
from lightning_mvar.tokenizer.codebook import CodebookAverage, CodebookConfig, assignment_sums, draw_residuals
from lightning_mvar.tokenizer.discriminator import AdversaryConfig, PatchDiscriminator, min_image_side
from lightning_mvar.tokenizer.quantizer import PyramidStep
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from lightning_mvar.training.base import ScheduledModule, update_ema, warm_up_decay
from lightning_mvar.training.batches import image_batch
from lightning_mvar.training.collectives import broadcast_from_rank_zero, mean_over_ranks, sum_over_ranks
from lightning_mvar.training.optim import OptimizerConfig, build_optimizer
from lightning_mvar.training.resuming import AS_BEFORE, require_same
from lightning_mvar.training.strategies import FSDP2Strategy, assign_values, full_tensor
from lightning_mvar.training.tokenizer_loss import TokenizerLoss

log = logging.getLogger(__name__)

TOKENIZER_KEY = "lightning_mvar_tokenizer"
NEW_RUN = "start a new run from its finished tokenizer with --model.weights FOLDER"


class LitTokenizer(ScheduledModule):
    """Trains a tokenizer to reconstruct images, with a straight-through gradient at the quantizer.

    Loss = mse(image) + l1_weight l1(image) + mean over scales of [mse(f_hat, sg(f)) + commitment mse(sg(f_hat), f)]
    + perceptual_weight perceptual(image) + adversarial and entropy terms of `adversary` and `codebook`.

    Tokenizer and discriminator are trained in the same steps, each with its own loss and its own gradient norm.

    Args:
        tokenizer: architecture of the tokenizer.
        optimizer: the optimizer and its schedules.
        l1_weight: weight of the mean absolute error of the images; the mean squared error has weight 1.
        commitment: weight of the commitment loss, which pulls the encoder's features towards the codes.
        revive_every: number of steps after which codes that were not used since the last revival are revived; 0 for
            never.
        revive_until: share of all steps after which codes are no longer revived, so that the codebook converges.
        max_skipped_steps: number of consecutive steps with gradients that are not finite after which training stops.
        weights: initial weights: a folder of `train-tokenizer` or `export`, or the published file
            (`vae_ch160v4096z32.pth`). The schedule may differ, for another resolution; everything else must agree.
        ema_decay: decay of an exponential moving average of the weights, which is validated and saved (in the first
            steps at most (1 + step) / (10 + step), with steps counted from 0). 0.999 is usual; null keeps no average.
        perceptual: distance between images: `lightning_mvar.tokenizer.perceptual.LPIPS` with its files, or any
            nn.Module, two batches (b, 3, H, W) in [-1, 1] -> (b,).
        perceptual_weight: weight of the perceptual distance.
        adversary: patch discriminator and its loss.
        codebook: how the codes are learned and kept in use.
        activation_checkpointing: keep only the inputs of the normalizations in residual blocks for the backward pass,
            which recomputes norm and SiLU: half the memory per image for a little more time.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        l1_weight: float = 0.5,
        commitment: float = 0.25,
        revive_every: int = 20,
        revive_until: float = 0.8,
        max_skipped_steps: int = 20,
        weights: str | None = None,
        ema_decay: float | None = None,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversary: AdversaryConfig = AdversaryConfig(),  # noqa: B008 (frozen)
        codebook: CodebookConfig = CodebookConfig(),  # noqa: B008 (frozen)
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, max_skipped_steps)
        weights_of_terms = {"l1_weight": l1_weight, "commitment": commitment, "perceptual_weight": perceptual_weight}
        require_in("[0, inf)", "model.", revive_every=revive_every, **weights_of_terms)
        require_in("[0, 1]", "model.", revive_until=revive_until)
        require_in("[0, 1)", "model.", ema_decay=ema_decay)
        if codebook.scale_dropout and tokenizer.schedule.num_scales == 1:
            raise InputError("codebook.scale_dropout needs a schedule of more than one scale")
        self.tokenizer = Tokenizer(tokenizer) if weights is None else load_pretrained(weights, tokenizer)
        self.revive_every, self.revive_until = revive_every, revive_until
        self.adversary, self.codebook, self.ema_decay = adversary, codebook, ema_decay
        self.discriminator: PatchDiscriminator | None = None
        if adversary.weight:
            self.discriminator = PatchDiscriminator(adversary, tokenizer.shape)
        self.code_average: CodebookAverage | None = None
        codes = self.tokenizer.quantizer.codebook.weight
        if codebook.learning == "ema":
            self.code_average = CodebookAverage(codes.requires_grad_(False), codebook)
        terms = (l1_weight, commitment, perceptual, perceptual_weight, adversary, codebook)
        self.loss = TokenizerLoss(self.tokenizer, *terms)
        self.ema = None if ema_decay is None else copy.deepcopy(self.tokenizer).requires_grad_(False)
        if activation_checkpointing:
            for part in self.tokenizer.modules():
                if isinstance(part, ResidualBlock):
                    part.enable_activation_checkpointing()
        # Counts of each code per scale (k, v): in training since the last revival, in validation over the epoch.
        # They are not buffers, because DDP would overwrite those of all ranks with rank 0's.
        usage = torch.zeros(tokenizer.schedule.num_scales, tokenizer.vocab_size, dtype=torch.int64)
        self.usage = {"train": usage, "val": usage.clone()}
        self.code_sums: Tensor | None = None  # (v, c + 1) in the current step, see `assignment_sums`
        self.sharded = False

    def configure_model(self) -> None:
        """Shards the networks if the strategy does."""
        strategy = self.trainer.strategy
        if self.sharded or not isinstance(strategy, FSDP2Strategy):
            return
        self.sharded = True
        for tokenizer in (self.tokenizer, self.ema):
            if tokenizer is not None:
                strategy.shard_tokenizer(tokenizer)
        if self.discriminator is not None:
            strategy.shard(self.discriminator)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.tokenizer, self.optimizer_config, self.fused)
        if self.discriminator is not None:
            parameters = [*self.discriminator.parameters()]
            group = {"params": parameters, "decays": False, "weight_decay": 0.0, "lr_factor": self.adversary.lr_factor}
            optimizer.add_param_group(group)
        return optimizer

    def clip_groups(self) -> dict[str, nn.Module]:
        if self.discriminator is None:
            return {"grad_norm": self}
        return {"grad_norm": self.tokenizer, "grad_norm_discriminator": self.discriminator}

    @property
    def averaged(self) -> Tokenizer:
        """The tokenizer to validate and save: the weight average if there is one, otherwise the trained weights."""
        return self.tokenizer if self.ema is None else self.ema

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Accepts batches from any DataLoader; see `image_batch`."""
        return image_batch(batch, self.tokenizer.config.shape)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.warn_about_corrupt_images(batch)
        if not len(batch.images):
            raise InputError("no image of a batch could be decoded; see the messages above")
        reconstruction = self.tokenizer(batch.images, self.draw_scale_counts(len(batch.images), batch_idx))
        if self.discriminator is not None and self.global_step >= self.adversary.start_step:
            losses, loss = self.loss.adversarial_terms(self.discriminator, batch.images, reconstruction)
        else:
            losses, _ = self.loss.terms(batch.images, reconstruction, reconstruction.decoded)
            loss = losses["loss"] + self.idle_discriminator_term(batch.images)
        if self.codebook.entropy_weight:
            losses["entropy"] = self.loss.entropy(reconstruction)
            loss = loss + self.codebook.entropy_weight * losses["entropy"]
        self.track_codebook(reconstruction.steps, batch_idx)
        if self.is_logging_step:
            means = mean_over_ranks(torch.stack([value.detach().float() for value in losses.values()]))
            self.log_scalars(dict(zip((f"train/{name}" for name in losses), means, strict=True)))
        return loss

    def track_codebook(self, steps: list[PyramidStep], batch_idx: int) -> None:
        """Counts the chosen codes, and revives unused ones every `revive_every` steps."""
        self.count_usage("train", steps)
        if self.code_average is not None:
            code_sums = assignment_sums(steps, self.tokenizer.config.vocab_size)
            self.code_sums = code_sums if self.code_sums is None else self.code_sums + code_sums
        completes_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if self.revive_every and completes_step and (self.global_step + 1) % self.revive_every == 0:
            self.revive(steps)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | None:
        """Logs the losses; returns reconstructions (b, 3, H, W) float32 in [-1, 1], None if no image is readable."""
        self.warn_about_corrupt_images(batch)
        count, images = len(batch.images), batch.images
        if not count:
            if not self.sharded:
                return None
            # A pass runs nonetheless, because a sharded one needs all ranks.
            images = torch.zeros(1, 3, *self.tokenizer.config.shape, device=self.device)
        reconstruction = self.averaged(images)
        losses, _ = self.loss.terms(images, reconstruction, reconstruction.decoded)
        if count:
            self.count_usage("val", reconstruction.steps)
        self.log_dict({f"val/{n}": v for n, v in losses.items()}, batch_size=count, sync_dist=True)
        return reconstruction.decoded.float().clamp(-1, 1) if count else None

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Returns reconstructions (b, 3, H, W) float32 in [-1, 1]."""
        decoded: Tensor = self.averaged(batch.images).decoded
        return decoded.float().clamp(-1, 1)

    def on_validation_epoch_end(self) -> None:
        """Logs codebook usage and perplexity of each scale."""
        counts = sum_over_ranks(self.usage["val"].to(self.device))
        used = counts > 0
        self.log("val/codebook_usage", used.any(dim=0).float().mean(), prog_bar=True, sync_dist=True)
        perplexities = perplexity(counts).float()
        for k, name in enumerate(self.tokenizer.config.schedule.names):
            self.log(f"codebook_usage/{name}", used[k].float().mean(), sync_dist=True)
            self.log(f"codebook_perplexity/{name}", perplexities[k], sync_dist=True)
        self.usage["val"] = torch.zeros_like(self.usage["val"])

    def idle_discriminator_term(self, images: Tensor) -> Tensor | float:
        """Returns 0, with the untrained discriminator in its graph because DDP expects gradients of all weights."""
        if self.discriminator is None:
            return 0.0
        side = min_image_side(self.adversary)
        return 0 * self.discriminator(images[:1, :, :side, :side]).sum()

    def draw_scale_counts(self, count: int, batch_idx: int) -> Tensor | None:
        """Draws the number of leading scales (count,) from which each image is decoded; None for all scales.

        The draws are made for the global batch from (seed, epoch, batch), and this rank uses its part, so neither the
        number of ranks nor an interruption changes the result.
        """
        if not self.codebook.scale_dropout:
            return None
        generator = torch.Generator().manual_seed(self.derive_seed(batch_idx, "scale dropout"))
        size = (self.trainer.world_size, self.batch_size)
        scales = self.tokenizer.config.schedule.num_scales
        first = torch.randint(1, scales, size, generator=generator)
        dropped = torch.rand(size, generator=generator) < self.codebook.scale_dropout
        drawn = torch.where(dropped, first, scales)[self.global_rank, :count]
        return drawn.to(self.device, non_blocking=True)

    def count_usage(self, stage: str, steps: list[PyramidStep]) -> None:
        vocab_size = self.tokenizer.config.vocab_size
        tokens = [step.tokens.flatten() for step in steps]
        zeros = tokens[0].new_zeros(vocab_size)
        # `bincount` would make the host wait for the device.
        counts = torch.stack([zeros.scatter_add(0, scale, torch.ones_like(scale)) for scale in tokens])
        self.usage[stage] = self.usage[stage].to(counts.device) + counts

    @torch.no_grad()
    def revive(self, steps: list[PyramidStep]) -> None:
        """Moves each unused code to a residual of this batch, the same on all ranks.

        Residuals are taken equally often from all scales: most belong to the finest scale, so a uniform draw would
        leave the coarse scales without codes.
        """
        unused = sum_over_ranks(self.usage["train"].sum(dim=0)) == 0  # (v,)
        self.usage["train"] = torch.zeros_like(self.usage["train"])
        if self.global_step > self.revive_until * self.total_steps:
            return
        residuals = broadcast_from_rank_zero(draw_residuals(steps, len(unused)))
        # Residual i is for the i-th unused code; only the device knows how many there are.
        residuals = residuals[(unused.cumsum(0) - 1).clamp(min=0)]
        for tokenizer in (self.tokenizer, self.ema):
            if tokenizer is not None:  # also in the average: a mean of old and new code would match no residual
                weight = tokenizer.quantizer.codebook.weight
                codes = full_tensor(weight.detach())
                assign_values(weight, torch.where(unused[:, None], residuals.to(codes), codes))
        if self.code_average is not None:
            self.code_average.restart(unused, residuals.to(self.code_average.sums))
        self.log("train/revived_codes", unused.sum().float())

    @torch.no_grad()
    def after_step(self) -> None:
        """Updates the codes, if they are running means, then the weight average."""
        if self.code_average is not None and self.code_sums is not None:
            codes = self.code_average.update(sum_over_ranks(self.code_sums), self.gradients_finite)
            assign_values(self.tokenizer.quantizer.codebook.weight, codes)
            self.code_sums = None
        if self.ema is not None and self.ema_decay is not None:
            update_ema(self.ema, self.tokenizer, warm_up_decay(self.ema_decay, self.global_step), self.gradients_finite)

    def warn_about_corrupt_images(self, batch: ImageBatch) -> None:
        for message in batch.errors:
            log.warning("skipped: %s", message)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, **options: Any
    ) -> LitTokenizer:
        """Builds the module from a checkpoint of `train-tokenizer`, sharded or not, with its weights and their average.

        Args:
            checkpoint_path: the checkpoint.
            map_location: device to which the module is moved.
            options: other arguments of the constructor for further training. The checkpoint provides only the tokenizer
                and the decay of its average. An adversary starts with a new discriminator, and an average that the
                checkpoint lacks starts with the current weights.

        Raises:
            InputError: if the checkpoint is missing or not from `train-tokenizer`.
        """
        path = resolve_last(Path(checkpoint_path).expanduser())
        record = read_plain_part(path).get(TOKENIZER_KEY)
        if record is None:
            raise InputError(f"{path} is not a checkpoint of `lightning-mvar train-tokenizer`")
        require_current(record, path)
        if record["ema"] and "ema_decay" not in options:
            options["ema_decay"] = record["ema_decay"]
        module = cls(checked(record["config"], TokenizerConfig, str(path)), **options)
        module.tokenizer.load_state_dict(read_tensors(path, "tokenizer."))
        if module.ema is not None:
            module.ema.load_state_dict(read_tensors(path, EMA_PREFIX if record["ema"] else "tokenizer."))
        if module.code_average is not None:
            if record.get("codebook.learning") == "ema":
                module.code_average.load_state_dict(read_tensors(path, "code_average."))
            else:  # so far, the codes were learned by gradient
                codes = module.tokenizer.quantizer.codebook.weight
                module.code_average = CodebookAverage(codes, module.codebook)
        return module.to(map_location) if map_location is not None else module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        usage = self.usage["train"]
        if not self.saves_alone:  # otherwise, the other ranks' counts since the last revival are lost
            usage = sum_over_ranks(usage.to(self.device))
        checkpoint[TOKENIZER_KEY] = self.checkpoint_identity() | {
            "train_usage": usage.cpu(),
            "skipped_steps": self.skip_counts,
            "ema_decay": self.ema_decay,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = checkpoint[TOKENIZER_KEY]
        self.check_checkpoint(record)
        super().on_load_checkpoint(checkpoint)
        usage, own = record.get("train_usage"), self.usage["train"]
        if not isinstance(usage, Tensor) or (usage.shape, usage.dtype) != (own.shape, own.dtype):
            raise InputError(f"--ckpt_path is damaged: train_usage must be an int64 tensor {tuple(own.shape)}")
        # The saved counts are the sum over all ranks: rank 0 takes them, the others start from 0.
        self.usage["train"] = usage * (self.global_rank == 0)
        skipped = checked(record.get("skipped_steps"), tuple[int, int], "--ckpt_path: skipped_steps")
        self.skipped_steps, self.skipped_in_a_row = skipped

    def checkpoint_identity(self) -> dict[str, Any]:
        """Returns the settings that a checkpoint must share with this run to resume it."""
        size = {"channels": self.adversary.channels, "levels": self.adversary.levels}
        return {
            "config": asdict(self.tokenizer.config),
            "discriminator": None if self.discriminator is None else size,
            "codebook.learning": self.codebook.learning,
            "ema": self.ema is not None,
            "muon": self.optimizer_config.muon,
        }

    def check_checkpoint(self, record: dict[str, Any]) -> None:
        """Refuses a checkpoint with another tokenizer or without something that this run trains.

        Settings that are newer than the checkpoint are assumed to have had their defaults.

        Raises:
            InputError: naming the first setting that differs.
        """
        require_current(record, "--ckpt_path")
        settings = {name: value for name, value in record.items() if name != "train_usage"}
        settings = checked(settings, dict[str, Any], "--ckpt_path")
        config = asdict(checked(settings.get("config"), TokenizerConfig, "--ckpt_path"))
        defaults = {"codebook.learning": CodebookConfig().learning, "muon": OptimizerConfig().muon}
        saved_settings = defaults | settings | {"config": config}
        names = {
            "config": "tokenizer",
            "ema": "keeping an average of the weights (ema_decay)",
            "muon": "--model.optimizer.muon",
        }
        for name, current in self.checkpoint_identity().items():
            condition = "; if only the schedule differs," if name == "config" else ", or"
            remedy = f"{AS_BEFORE}{condition} {NEW_RUN}"
            require_same(names.get(name, name), saved_settings.get(name), current, remedy)


def require_current(record: Any, source: str | Path) -> None:
    """Raises InputError for a checkpoint of an earlier version, which recorded its settings in another form."""
    if not isinstance(record, dict):
        raise InputError(f"{source} is damaged: {TOKENIZER_KEY} is {shown(record)}")
    if "ema" not in record:
        raise InputError(
            f"{source} is from an earlier version of lightning_mvar and cannot be resumed: train with --overwrite, or "
            f"{NEW_RUN}"
        )


def load_pretrained(weights: str, config: TokenizerConfig) -> Tokenizer:
    """Builds a tokenizer with weights from a folder, a published file or a name on the Hub.

    Raises:
        InputError: if the weights are missing, or their configuration differs in more than the schedule.
    """
    loaded = load_tokenizer(weights, config.schedule)
    saved, current = asdict(loaded.config), asdict(config)
    for name in current:
        if name != "schedule" and saved[name] != current[name]:
            raise InputError(f"--model.weights {weights}: {name} is {saved[name]} there, {current[name]} in this run")
    tokenizer = Tokenizer(config)
    tokenizer.load_state_dict(loaded.state_dict())
    return tokenizer
