"""Training the tokenizer: reconstruction, commitment, and a codebook that stays alive (VAR, section 3.1)."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.data.images import ImageBatch
from lightning_mvar.errors import InputError
from lightning_mvar.optim import OptimizerConfig
from lightning_mvar.scheduled_module import ScheduledModule
from lightning_mvar.tokenizer.quantizer import PyramidStep
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "lightning_mvar_tokenizer"


class LitTokenizer(ScheduledModule):
    """A tokenizer and its reconstruction loss; gradients pass the quantizer straight through.

    Loss = mse(image) + l1_weight l1(image) + mean over scales of [mse(f_hat, sg(f)) + commitment mse(sg(f_hat), f)].

    Args:
        tokenizer: what the tokenizer is made of.
        optimizer: AdamW and its schedules.
        l1_weight: weight of the image's mean absolute error beside its mean squared error.
        commitment: weight of pulling the encoder's features towards the codes.
        revive_every: steps between revivals of the codes that nothing used since the last one; 0 for never.
        revive_until: share of all steps after which no code is revived any more, so that the codebook settles.
        max_skipped_steps: training ends after so many steps in a row whose gradients were not finite.
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
    ) -> None:
        super().__init__(optimizer, max_skipped_steps)
        self.tokenizer = Tokenizer(tokenizer)
        self.l1_weight, self.commitment = l1_weight, commitment
        self.revive_every, self.revive_until = revive_every, revive_until
        # Times each code was chosen at each scale (k, v): in training since the last revival, over a validation epoch.
        # Not buffers: DDP would overwrite those of all ranks with the first one's.
        usage = torch.zeros(tokenizer.schedule.num_scales, tokenizer.vocab_size, dtype=torch.int64)
        self.usage = {"train": usage, "val": usage.clone()}

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.report_corrupt(batch)
        if not len(batch.images):
            raise InputError("a whole batch of images could not be decoded; see the messages above")
        steps, losses = self.reconstruct(batch.images)
        self.count_usage("train", steps)
        steps_now = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if self.revive_every and steps_now and (self.global_step + 1) % self.revive_every == 0:
            self.revive(steps)
        if self.logs_now:
            self.log_now({f"train/{name}": value.detach() for name, value in losses.items()})
        return losses["loss"]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.report_corrupt(batch)
        if not len(batch.images):
            return
        steps, losses = self.reconstruct(batch.images)
        self.count_usage("val", steps)
        self.log_dict({f"val/{n}": v for n, v in losses.items()}, batch_size=len(batch.images), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        used = self.trainer.strategy.reduce(self.usage["val"].to(self.device), reduce_op="sum") > 0
        self.log("val/codebook_usage", used.any(dim=0).float().mean(), prog_bar=True, sync_dist=True)
        sides = self.tokenizer.config.schedule.side_lengths
        usage = {f"codebook_usage/{side}": row.float().mean() for side, row in zip(sides, used, strict=True)}
        self.log_dict(usage, sync_dist=True)
        self.usage["val"] = torch.zeros_like(self.usage["val"])

    def reconstruct(self, images: Tensor) -> tuple[list[PyramidStep], dict[str, Tensor]]:
        """The quantizing of images (b, 3, H, W) in [-1, 1], and the terms of the loss."""
        features = self.tokenizer.features(images)
        steps = list(self.tokenizer.quantizer.pyramid(features))
        codebook = torch.stack([F.mse_loss(step.f_hat, features.detach()) for step in steps]).mean()
        commitment = torch.stack([F.mse_loss(step.f_hat.detach(), features) for step in steps]).mean()
        straight_through = features + (steps[-1].f_hat - features).detach()
        decoded = self.tokenizer.decode_features(straight_through)
        l2, l1 = F.mse_loss(decoded, images), F.l1_loss(decoded, images)
        loss = l2 + self.l1_weight * l1 + codebook + self.commitment * commitment
        return steps, {"loss": loss, "l2": l2, "l1": l1, "codebook": codebook, "commitment": commitment}

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
        weight = self.tokenizer.quantizer.codebook.weight
        weight[unused] = self.trainer.strategy.broadcast(chosen.cpu()).to(weight)
        self.log("train/revived_codes", float(len(unused)))

    def report_corrupt(self, batch: ImageBatch) -> None:
        for message in batch.errors:
            log.warning("skipped: %s", message)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {
            "config": asdict(self.tokenizer.config),
            "train_usage": self.usage["train"].cpu(),
            "skipped_steps": self.skipped,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        about = checkpoint[CHECKPOINT_KEY]
        self.check_checkpoint(about)
        self.usage["train"] = about["train_usage"]
        self.skipped_steps, self.skipped_in_a_row = about["skipped_steps"]

    def check_checkpoint(self, about: dict[str, Any]) -> None:
        """Refuse to resume a checkpoint of another tokenizer (InputError)."""
        theirs, ours = about["config"], asdict(self.tokenizer.config)
        if theirs != ours:
            raise InputError(f"--ckpt_path is of another tokenizer: {theirs} in the checkpoint, {ours} in this run")
