"""Training the tokenizer: reconstruction, commitment, and a codebook that stays alive (VAR, section 3.1)."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.checkpoints import load_official_tokenizer, load_tokenizer
from lightning_mvar.data.images.examples import ImageBatch
from lightning_mvar.errors import InputError
from lightning_mvar.tokenizer.codebook import CodebookAverage, CodebookConfig, entropy_loss, sums_of_choices
from lightning_mvar.tokenizer.discriminator import (
    AdversaryConfig,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    last_layer_gradient,
    least_side,
    with_gradient,
)
from lightning_mvar.tokenizer.quantizer import PyramidStep
from lightning_mvar.tokenizer.tokenizer import Reconstruction, Tokenizer, TokenizerConfig
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.optim import OptimizerConfig, build_optimizer
from lightning_mvar.training.strategies import FSDP2Strategy, local, overwrite, plain

log = logging.getLogger(__name__)

TOKENIZER_KEY = "lightning_mvar_tokenizer"
GRADIENT_SCALE = 2.0**16  # that float16's loss scaling begins with; a power of two rounds nothing


class LitTokenizer(ScheduledModule):
    """A tokenizer and its reconstruction loss; gradients pass the quantizer straight through.

    Loss = mse(image) + l1_weight l1(image) + mean over scales of [mse(f_hat, sg(f)) + commitment mse(sg(f_hat), f)]
    + perceptual_weight perceptual(image) + adversarial and entropy terms as `adversary` and `codebook` say.

    Tokenizer and discriminator learn in the same steps, each from its own loss, clipped by its own norm.

    Args:
        tokenizer: what the tokenizer is made of.
        optimizer: AdamW and its schedules.
        l1_weight: weight of the image's mean absolute error beside its mean squared error.
        commitment: weight of pulling the encoder's features towards the codes.
        revive_every: steps between revivals of the codes that nothing used since the last one; 0 for never.
        revive_until: share of all steps after which no code is revived any more, so that the codebook settles.
        max_skipped_steps: training ends after so many steps in a row whose gradients were not finite.
        weights: what to begin with: a folder of `train-tokenizer` or `export`, or the published file
            (`vae_ch160v4096z32.pth`). The schedule may be another one, for another resolution; all else must agree.
        ema_decay: keep an average of the weights beside them, validate and save that: each step it keeps this share of
            itself (less in the first steps: (1 + step) / (10 + step), counted from 0). 0.999 is usual, null for none.
        perceptual: a distance between images: `lightning_mvar.tokenizer.perceptual.LPIPS` with its files, or any
            nn.Module, two batches (b, 3, H, W) in [-1, 1] -> (b,).
        perceptual_weight: of that distance.
        adversary: a discriminator of patches.
        codebook: how the codes are learned and kept in use.
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
    ) -> None:
        super().__init__(optimizer, max_skipped_steps)
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise InputError(f"model.ema_decay must be in [0, 1), got {ema_decay}")
        if codebook.scale_dropout and tokenizer.schedule.num_scales == 1:
            raise InputError("codebook.scale_dropout needs a schedule of more than one scale")
        self.tokenizer = Tokenizer(tokenizer) if weights is None else pretrained(weights, tokenizer)
        self.l1_weight, self.commitment = l1_weight, commitment
        self.revive_every, self.revive_until = revive_every, revive_until
        self.adversary, self.codebook, self.ema_decay = adversary, codebook, ema_decay
        self.discriminator: PatchDiscriminator | None = None
        if adversary.weight:
            self.discriminator = PatchDiscriminator(adversary, tokenizer.shape)
        self.code_average: CodebookAverage | None = None
        codes = self.tokenizer.quantizer.codebook.weight
        if codebook.learning == "ema":
            self.code_average = CodebookAverage(codes.requires_grad_(False), codebook)
        # In a list that hides it from the module registry: it is not trained and not saved.
        self.perceptual = [] if perceptual is None else [perceptual.eval().requires_grad_(False)]
        self.perceptual_weight = perceptual_weight
        self.ema = None if ema_decay is None else copy.deepcopy(self.tokenizer).requires_grad_(False)
        # Times each code was chosen at each scale (k, v): in training since the last revival, over a validation epoch.
        # Not buffers: DDP would overwrite those of all ranks with the first one's.
        usage = torch.zeros(tokenizer.schedule.num_scales, tokenizer.vocab_size, dtype=torch.int64)
        self.usage = {"train": usage, "val": usage.clone()}
        self.chosen: Tensor | None = None  # (v, c + 1) of the step under way, see `sums_of_choices`
        self.sharded = False

    def configure_model(self) -> None:
        """Shard, where the strategy does."""
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
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16, which fused kernels would bypass
        optimizer = build_optimizer(self.tokenizer, self.optimizer_config, fused=scaler is None)
        if self.discriminator is not None:
            parameters = [*self.discriminator.parameters()]
            group = {"params": parameters, "decays": False, "weight_decay": 0.0, "lr_factor": self.adversary.lr_factor}
            optimizer.add_param_group(group)
        return optimizer

    def clipped_apart(self) -> dict[str, nn.Module]:
        if self.discriminator is None:
            return {"grad_norm": self}
        return {"grad_norm": self.tokenizer, "grad_norm_discriminator": self.discriminator}

    @property
    def averaged(self) -> Tokenizer:
        """What to validate and to save: the average of the weights, or the weights themselves where none is kept."""
        return self.tokenizer if self.ema is None else self.ema

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.report_corrupt(batch)
        if not len(batch.images):
            raise InputError("a whole batch of images could not be decoded; see the messages above")
        made = self.tokenizer(batch.images, self.draw_scales(len(batch.images), batch_idx))
        if self.discriminator is not None and self.global_step >= self.adversary.start_step:
            losses, loss = self.compete(self.discriminator, batch.images, made)
        else:
            losses, _ = self.losses(batch.images, made, made.decoded)
            loss = losses["loss"] + self.waiting(batch.images)
        if self.codebook.entropy_weight:
            losses["entropy"] = self.entropy(made)
            loss = loss + self.codebook.entropy_weight * losses["entropy"]
        self.note_choices(made.steps, batch_idx)
        if self.logs_now:
            means = self.over_ranks(torch.stack([value.detach().float() for value in losses.values()]))
            self.log_now(dict(zip((f"train/{name}" for name in losses), means, strict=True)))
        return loss

    def note_choices(self, steps: list[PyramidStep], batch_idx: int) -> None:
        """Count which codes were chosen, and revive those that were not, where that is due."""
        self.count_usage("train", steps)
        if self.code_average is not None:
            chosen = sums_of_choices(steps, self.tokenizer.config.vocab_size)
            self.chosen = chosen if self.chosen is None else self.chosen + chosen
        steps_now = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if self.revive_every and steps_now and (self.global_step + 1) % self.revive_every == 0:
            self.revive(steps)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | None:
        """Log the losses of the batch; its reconstructions (b, 3, H, W) float32 in [-1, 1], None where it has none."""
        self.report_corrupt(batch)
        count, images = len(batch.images), batch.images
        if not count:
            if not self.sharded:
                return None
            images = torch.zeros(1, 3, *self.tokenizer.config.shape, device=self.device)  # as other ranks do
        made = self.averaged(images)
        losses, _ = self.losses(images, made, made.decoded)
        if count:
            self.count_usage("val", made.steps)
        self.log_dict({f"val/{n}": v for n, v in losses.items()}, batch_size=count, sync_dist=True)
        return made.decoded.float().clamp(-1, 1) if count else None

    def on_validation_epoch_end(self) -> None:
        """Log what share of the codes each scale uses, and the exponential of the entropy of its choices."""
        counts = self.trainer.strategy.reduce(self.usage["val"].to(self.device), reduce_op="sum")
        used = counts > 0
        self.log("val/codebook_usage", used.any(dim=0).float().mean(), prog_bar=True, sync_dist=True)
        share = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
        perplexity = torch.special.entr(share).sum(dim=1).exp().float()
        for k, name in enumerate(self.tokenizer.config.schedule.names):
            self.log(f"codebook_usage/{name}", used[k].float().mean(), sync_dist=True)
            self.log(f"codebook_perplexity/{name}", perplexity[k], sync_dist=True)
        self.usage["val"] = torch.zeros_like(self.usage["val"])

    def losses(self, images: Tensor, made: Reconstruction, decoded: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the loss but adversarial and entropy ones, with their sum `loss`; and the picture's part of it.

        Args:
            images: (b, 3, H, W) in [-1, 1].
            made: of them.
            decoded: the reconstructions (b, 3, H, W) to compare with them.
        """
        losses = {"l2": F.mse_loss(decoded, images), "l1": F.l1_loss(decoded, images)}
        picture = losses["l2"] + self.l1_weight * losses["l1"]
        for network in self.perceptual:
            losses["perceptual"] = network.to(self.device)(decoded, images).mean()
            picture = picture + self.perceptual_weight * losses["perceptual"]
        loss = picture + made.codebook + self.commitment * made.commitment
        return {"loss": loss, **losses, "codebook": made.codebook, "commitment": made.commitment}, picture

    def compete(
        self, discriminator: PatchDiscriminator, images: Tensor, made: Reconstruction
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the loss with a discriminator, and what to differentiate: each network's loss reaches it alone.

        The reconstructions are taken out of the graph. What the losses of the picture want of them goes back in as a
        gradient, which neither touches the discriminator's weights nor has it run twice.
        """
        outputs = made.decoded.float()  # a gradient in float16 would not have the range
        decoded = outputs.detach().requires_grad_()
        losses, picture = self.losses(images, made, decoded)
        wanted = torch.autograd.grad(GRADIENT_SCALE * picture, decoded)[0] / GRADIENT_SCALE
        real, fake = discriminator(torch.cat([images, decoded])).chunk(2)
        (towards_real,) = torch.autograd.grad(-fake.float().sum(), decoded, retain_graph=True)
        towards_real = towards_real / fake.numel()  # not of the mean, whose gradient would vanish in float16
        weight = self.adversary.weight * self.adaptive_weight(made.maps, wanted, towards_real)
        losses |= {"adversarial": -fake.detach().float().mean(), "discriminator": hinge_loss(real, fake)}
        losses["adversary_weight"] = weight
        picture = picture + weight * losses["adversarial"]
        again = with_gradient(picture, outputs, wanted + weight * towards_real)
        return losses, losses["codebook"] + self.commitment * losses["commitment"] + again + losses["discriminator"]

    def waiting(self, images: Tensor) -> Tensor | float:
        """0 with the discriminator in its graph, while it is not trained yet: DDP expects gradients of all weights."""
        if self.discriminator is None:
            return 0.0
        side = least_side(self.adversary)
        return 0 * self.discriminator(images[:1, :, :side, :side]).sum()

    def adaptive_weight(self, maps: Tensor, wanted: Tensor, towards_real: Tensor) -> Tensor:
        """() VQGAN's ratio of the gradients of both losses at the decoder's last layer, the same on all ranks."""
        if not self.adversary.adaptive:
            return wanted.new_ones(())
        last = self.tokenizer.decoder.conv_out
        both = torch.stack([last_layer_gradient(last, maps, gradient) for gradient in (wanted, towards_real)])
        return adaptive_weight(*self.over_ranks(both))

    def entropy(self, made: Reconstruction) -> Tensor:
        quantizer = self.tokenizer.quantizer
        return entropy_loss(quantizer, made.features, made.steps, made.codes, self.codebook, self.over_ranks)

    def over_ranks(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks."""
        return torch.as_tensor(self.trainer.strategy.reduce(tensor, reduce_op="mean"))

    def draw_scales(self, count: int, batch_idx: int) -> Tensor | None:
        """(count,) from how many of the first scales each image is decoded; None for all.

        Drawn from (seed, epoch, batch) for the global batch, of which this rank takes its part: neither the number of
        ranks nor an interruption changes it.
        """
        if not self.codebook.scale_dropout:
            return None
        generator = torch.Generator().manual_seed(self.random_key(batch_idx, "scale dropout"))
        size = (self.trainer.world_size, self.data.batch_size)
        scales = self.tokenizer.config.schedule.num_scales
        first = torch.randint(1, scales, size, generator=generator)
        dropped = torch.rand(size, generator=generator) < self.codebook.scale_dropout
        drawn = torch.where(dropped, first, scales)[self.global_rank, :count]
        return drawn.to(self.device, non_blocking=True)

    def count_usage(self, stage: str, steps: list[PyramidStep]) -> None:
        vocab_size = self.tokenizer.config.vocab_size
        tokens = [step.tokens.flatten() for step in steps]
        none = tokens[0].new_zeros(vocab_size)
        # Not `bincount`, for which the host has to wait.
        counts = torch.stack([none.scatter_add(0, scale, torch.ones_like(scale)) for scale in tokens])
        self.usage[stage] = self.usage[stage].to(counts.device) + counts

    @torch.no_grad()
    def revive(self, steps: list[PyramidStep]) -> None:
        """Move every unused code onto a residual of this batch, all scales in equal parts, the same on all ranks.

        In equal parts, because most residuals are of the finest scale and the coarse ones would be left without codes.
        """
        used = self.trainer.strategy.reduce(self.usage["train"].sum(dim=0), reduce_op="sum")
        self.usage["train"] = torch.zeros_like(self.usage["train"])
        if self.global_step > self.revive_until * self.total_steps:
            return
        unused = (used == 0).nonzero().flatten()
        queries = [step.queries.flatten(0, 1) for step in steps]  # (b n, c) of each scale
        scales = [queries[i % len(queries)] for i in range(len(unused))]
        chosen = torch.stack([q[torch.randint(len(q), ())] for q in scales]) if scales else queries[0][:0]
        chosen = self.trainer.strategy.broadcast(chosen.cpu())
        for tokenizer in (self.tokenizer, self.ema):
            if tokenizer is not None:  # the average, too: between the old place and the new there is nothing
                weight = tokenizer.quantizer.codebook.weight
                codes = plain(weight.detach()).clone()
                codes[unused] = chosen.to(codes)
                overwrite(weight, codes)
        if self.code_average is not None:
            self.code_average.restart(unused, chosen)
        self.log("train/revived_codes", float(len(unused)))

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the codes, where they are running means, and then the average of the weights towards the weights."""
        if self.code_average is not None and self.chosen is not None:
            chosen = self.trainer.strategy.reduce(self.chosen, reduce_op="sum")
            codes = self.code_average.update(torch.as_tensor(chosen), self.finite)
            overwrite(self.tokenizer.quantizer.codebook.weight, codes)
            self.chosen = None
        if self.ema is not None and self.ema_decay is not None:
            decay = min(self.ema_decay, (1 + self.global_step) / (10 + self.global_step))
            average, weights = local(list(self.ema.parameters())), local(list(self.tokenizer.parameters()))
            share = (1 - decay) * self.finite.float()
            torch._foreach_lerp_(average, weights, [share] * len(weights))

    def report_corrupt(self, batch: ImageBatch) -> None:
        for message in batch.errors:
            log.warning("skipped: %s", message)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[TOKENIZER_KEY] = self.kind() | {
            "train_usage": self.trainer.strategy.reduce(self.usage["train"].clone(), reduce_op="sum").cpu(),
            "skipped_steps": self.skipped,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        about = checkpoint[TOKENIZER_KEY]
        self.check_checkpoint(about)
        # Of all ranks together, so that one has it and the others begin to count anew.
        self.usage["train"] = about["train_usage"] * (self.global_rank == 0)
        self.skipped_steps, self.skipped_in_a_row = about["skipped_steps"]

    def kind(self) -> dict[str, Any]:
        """What a checkpoint must agree with to go on from."""
        size = (self.adversary.channels, self.adversary.levels)
        return {
            "config": asdict(self.tokenizer.config),
            "discriminator": "none" if self.discriminator is None else "{} channels, {} levels".format(*size),
            "codebook.learning": self.codebook.learning,
            "ema_decay (an average of the weights)": "not kept" if self.ema is None else "kept",
        }

    def check_checkpoint(self, about: dict[str, Any]) -> None:
        """Refuse to resume a checkpoint of another tokenizer, or one that lacks what this run trains (InputError)."""
        for name, ours in self.kind().items():
            theirs = about.get(name)
            if theirs != ours:
                other = "tokenizer" if name == "config" else f"kind: {name}"
                raise InputError(f"--ckpt_path is of another {other}: {theirs} in the checkpoint, {ours} in this run")


def pretrained(weights: str, config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of `config` with the weights of a folder or of a published file.

    Raises:
        InputError: if there are none, or they are of another tokenizer, schedules apart.
    """
    path = Path(weights)
    loaded = load_tokenizer(path) if path.is_dir() else load_official_tokenizer(path, config.schedule)
    theirs, ours = asdict(loaded.config), asdict(config)
    for name in ours:
        if name != "schedule" and theirs[name] != ours[name]:
            raise InputError(f"--model.weights {path}: {name} is {theirs[name]} there, {ours[name]} in this run")
    tokenizer = Tokenizer(config)
    tokenizer.load_state_dict(loaded.state_dict())
    return tokenizer
