"""Training a scale-by-scale network on tokens, teacher-forced (M-VAR, arXiv 2411.10433, section 4; VAR's recipe)."""

from __future__ import annotations

import random
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.checkpoints import CHECKPOINT_KEY, describe, load_tokenizer
from lightning_mvar.data.loader import TokenBatch
from lightning_mvar.errors import InputError
from lightning_mvar.models.mvar import MVAR, MVARConfig
from lightning_mvar.optim import OptimizerConfig, apply_schedule, build_optimizer
from lightning_mvar.sampling import check_pair
from lightning_mvar.tokenizer.tokenizer import Tokenizer


class ScheduledModule(L.LightningModule):
    """AdamW whose learning rate and weight decay follow `OptimizerConfig`, both logged with the gradient norm."""

    optimizer_config: OptimizerConfig

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, self.optimizer_config)

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, from max_steps or max_epochs.

        Not `trainer.estimated_stepping_batches`: reading that drops the loader's restored position.
        """
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise InputError("the learning-rate schedule needs an end: set --trainer.max_steps or --trainer.max_epochs")
        steps_per_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        return trainer.max_epochs * steps_per_epoch

    @cached_property
    def global_batch(self) -> int:
        """Images of one optimizer step."""
        trainer = self.trainer
        per_rank: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return per_rank * trainer.world_size * trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        step = (self.global_step, self.total_steps, self.global_batch)
        lr, weight_decay = apply_schedule(optimizer, self.optimizer_config, *step)
        self.log_dict({"train/lr": lr, "train/weight_decay": weight_decay})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))


class LitMVAR(ScheduledModule):
    """An M-VAR or VAR network and its teacher-forced loss: cross entropy of every token, mean over all scales.

    The tokenizer is frozen. It is held outside the module's registry, so it is neither trained nor sharded nor saved;
    a checkpoint remembers its path and fingerprint.

    Args:
        network: what the network is made of.
        tokenizer: folder of the tokenizer that made the tokens.
        optimizer: AdamW and its schedules.
        label_drop: share of the training labels replaced by the unconditional class.
    """

    def __init__(
        self,
        network: MVARConfig,
        tokenizer: str,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        label_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= label_drop <= 1:
            raise InputError(f"model.label_drop must be in [0, 1], got {label_drop}")
        self.network_config, self.tokenizer_path = network, tokenizer
        self.optimizer_config, self.label_drop = optimizer, label_drop
        self.network = MVAR(network)

    @cached_property
    def frozen(self) -> list[Tokenizer]:
        """The tokenizer, in a list that hides it from the module registry."""
        tokenizer = load_tokenizer(self.tokenizer_path).requires_grad_(False)
        check_pair(self.network_config, tokenizer.config, f"the tokenizer in {self.tokenizer_path}")
        return [tokenizer]

    @property
    def tokenizer(self) -> Tokenizer:
        """On the device of the network."""
        tokenizer = self.frozen[0]
        if tokenizer.quantizer.codebook.weight.device != self.device:
            tokenizer.to(self.device)
        return tokenizer

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        return self.frozen[0].fingerprint()

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        labels = self.drop_labels(batch.labels, batch_idx)
        losses, correct = self.score(batch, labels)
        summary = self.summary("train", losses, correct)
        self.log("train/loss", summary.pop("train/loss"), prog_bar=True)
        self.log_dict(summary | self.scale_losses("scale_loss", losses))
        return losses.mean()

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: TokenBatch, stage: str) -> None:
        """Log the teacher-forced scores of the batch's own samples, averaged over all of them at the epoch's end."""
        weight = int(batch.valid.sum())
        own = batch.valid if weight else slice(None)  # a batch of padding alone has weight 0
        losses, correct = (scores[own] for scores in self.score(batch, batch.labels))
        logged = self.summary(stage, losses, correct) | self.scale_losses(f"{stage}_scale_loss", losses)
        self.log_dict(logged, batch_size=weight, sync_dist=True)

    def score(self, batch: TokenBatch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy (b, l) in nats, and whether the likeliest token is the right one (b, l), both float32."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # in float32, as in sampling
            scale_inputs = self.tokenizer.scale_inputs(batch.tokens)
        logits = self.network(labels, scale_inputs)  # (b, l, v) float32
        losses = F.cross_entropy(logits.transpose(1, 2), batch.tokens, reduction="none")
        return losses, (logits.detach().argmax(dim=-1) == batch.tokens).float()

    def drop_labels(self, labels: Tensor, batch_idx: int) -> Tensor:
        """Replace a share of labels (b,) by the unconditional class.

        Drawn from (seed, epoch, batch) for the global batch, of which this rank takes its part: neither the number of
        ranks nor an interruption changes which labels are dropped.
        """
        key = random.Random(f"{torch.initial_seed()}-{self.current_epoch}-{batch_idx}").getrandbits(63)
        everywhere = torch.rand(self.trainer.world_size, len(labels), generator=torch.Generator().manual_seed(key))
        dropped = everywhere[self.global_rank] < self.label_drop
        return labels.masked_fill(dropped.to(labels.device), self.network_config.num_classes)

    def per_scale(self, scores: Tensor) -> tuple[Tensor, ...]:
        """(b, l) -> one (b, n) for each scale."""
        return scores.split(self.network_config.schedule.lengths, dim=1)

    def summary(self, stage: str, losses: Tensor, correct: Tensor) -> dict[str, Tensor]:
        """Means of loss and accuracy (b, l) over all tokens, and over those of the last scale."""
        return {
            f"{stage}/loss": losses.mean(),
            f"{stage}/loss_last_scale": self.per_scale(losses)[-1].mean(),
            f"{stage}/acc": correct.mean(),
            f"{stage}/acc_last_scale": self.per_scale(correct)[-1].mean(),
        }

    def scale_losses(self, prefix: str, losses: Tensor) -> dict[str, Tensor]:
        sides = self.network_config.schedule.side_lengths
        return {f"{prefix}/{side}": part.mean() for side, part in zip(sides, self.per_scale(losses), strict=True)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[CHECKPOINT_KEY] = describe(
            self.network_config,
            str(Path(self.tokenizer_path).resolve()),
            self.tokenizer_fingerprint,
            datamodule.class_names,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a checkpoint of another network or tokenizer.

        Raises:
            InputError: naming the first field that differs.
        """
        about = checkpoint[CHECKPOINT_KEY]
        theirs = about["network"] | {"tokenizer": about["tokenizer"]["fingerprint"]}
        ours = asdict(self.network_config) | {"tokenizer": self.tokenizer_fingerprint}
        for name in ours:
            if ours[name] != theirs.get(name):
                raise InputError(
                    f"--ckpt_path is of another configuration: {name} is {theirs.get(name)} in the checkpoint and "
                    f"{ours[name]} in this run"
                )
