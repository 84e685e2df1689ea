"""Training a scale-by-scale network on tokens, teacher-forced (M-VAR, arXiv 2411.10433, section 4; VAR's recipe)."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.checkpoints.pair import check_pair
from lightning_mvar.checkpoints.training import NETWORK_KEY, describe
from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR, UNDECAYED, Block
from lightning_mvar.sampling.generate import teacher_inputs
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.datamodules import TokenDataModule
from lightning_mvar.training.lightning_internals import attached_trainer
from lightning_mvar.training.optim import OptimizerConfig
from lightning_mvar.training.strategies import FSDP2Strategy, build, local, recompute_in_backward


class LitMVAR(ScheduledModule):
    """An M-VAR or VAR network and its teacher-forced loss: cross entropy of every token, mean over all scales.

    The tokenizer is frozen. It is held outside the module's registry, so it is neither trained nor sharded nor saved;
    a checkpoint remembers its path and fingerprint. The network exists from `configure_model` on, which every trainer
    calls when it knows the devices: sharded block by block where the strategy is `fsdp2`.

    Args:
        network: what the network is made of.
        tokenizer: folder of the tokenizer that made the tokens.
        optimizer: AdamW and its schedules.
        label_drop: share of the training labels replaced by the unconditional class.
        ema_decay: keep an average of the weights beside them, and sample from that: each step it keeps this share of
            itself (less in the first steps: (1 + step) / (10 + step), counted from 0). 0.9999 is usual, null for none.
        compile: compile each block with torch.compile.
        activation_checkpointing: keep only the input of each block for the backward pass and run the block again
            there: less memory, a third more time.
        max_skipped_steps: training ends after so many steps in a row whose gradients were not finite.
    """

    undecayed = UNDECAYED

    def __init__(
        self,
        network: MVARConfig,
        tokenizer: str,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        label_drop: float = 0.1,
        ema_decay: float | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        max_skipped_steps: int = 20,
    ) -> None:
        super().__init__(optimizer, max_skipped_steps)
        if not 0 <= label_drop <= 1:
            raise InputError(f"model.label_drop must be in [0, 1], got {label_drop}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise InputError(f"model.ema_decay must be in [0, 1), got {ema_decay}")
        self.network_config, self.tokenizer_path = network, tokenizer
        self.label_drop, self.ema_decay = label_drop, ema_decay
        self.compiles, self.recomputes = compile, activation_checkpointing
        self.network: MVAR
        self.ema: MVAR | None = None

    def setup(self, stage: str) -> None:
        """Checks that the datamodule's shards hold what the network predicts.

        Raises:
            InputError: naming the first field that differs.
        """
        super().setup(stage)
        data, network = cast(TokenDataModule, self.data), self.network_config
        for name, manifest in data.manifests.items():
            side_lengths = network.schedule.side_lengths
            what = (side_lengths, network.vocab_size, network.num_classes, self.tokenizer_fingerprint)
            manifest.check_model(data.shards[name], *what)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in label order, from the shards."""
        return cast(TokenDataModule, self.data).class_names

    def configure_model(self) -> None:
        """Build the network, in parts that may be sharded at once: see `build`."""
        if hasattr(self, "network"):
            return
        strategy = None if (trainer := attached_trainer(self)) is None else trainer.strategy
        device = self.device if strategy is None else strategy.root_device
        shard = strategy.shard if isinstance(strategy, FSDP2Strategy) else lambda part: None

        def finish(part: nn.Module) -> None:
            if isinstance(part, Block) and self.recomputes:
                recompute_in_backward(part)
            if isinstance(part, Block) and self.compiles:
                part.compile()
            shard(part)

        self.network = build(self.network_config, device, self.seed, finish)
        if self.ema_decay is not None:  # the same seed: it starts as a copy
            self.ema = build(self.network_config, device, self.seed, shard).requires_grad_(False)

    @property
    def averaged(self) -> MVAR:
        """What to sample from: the average of the weights, or the weights themselves where none is kept."""
        return self.network if self.ema is None else self.ema

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the weights, each rank its own share."""
        if self.ema is not None and self.ema_decay is not None:
            decay = min(self.ema_decay, (1 + self.global_step) / (10 + self.global_step))
            average, weights = local(list(self.ema.parameters())), local(list(self.network.parameters()))
            share = (1 - decay) * self.finite.float()
            torch._foreach_lerp_(average, weights, [share] * len(weights))

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
        if self.logs_now:
            scores = self.summary("train", losses.detach(), correct) | self.scale_losses("scale_loss", losses.detach())
            means = torch.as_tensor(self.trainer.strategy.reduce(torch.stack([*scores.values()]), reduce_op="mean"))
            self.log_now(dict(zip(scores, means, strict=True)))
        loss = losses.mean()
        return loss * (1 + 0 * loss.detach())  # a loss that is not finite makes every gradient so, on all ranks

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
            scale_inputs = teacher_inputs(self.network_config, self.tokenizer, batch.tokens)
        scores: tuple[Tensor, Tensor] = self.network(labels, scale_inputs, batch.tokens)
        return scores

    def drop_labels(self, labels: Tensor, batch_idx: int) -> Tensor:
        """Replace a share of labels (b,) by the unconditional class.

        Drawn from (seed, epoch, batch) for the global batch, of which this rank takes its part: neither the number of
        ranks nor an interruption changes which labels are dropped.
        """
        generator = torch.Generator().manual_seed(self.random_key(batch_idx, "label drop"))
        everywhere = torch.rand(self.trainer.world_size, len(labels), generator=generator)
        dropped = everywhere[self.global_rank] < self.label_drop
        dropped = dropped.to(labels.device, non_blocking=True)
        return labels.masked_fill(dropped, self.network_config.num_classes)

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
        names = self.network_config.schedule.names
        return {f"{prefix}/{name}": part.mean() for name, part in zip(names, self.per_scale(losses), strict=True)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        about = describe(
            self.network_config,
            str(Path(self.tokenizer_path).resolve()),
            self.tokenizer_fingerprint,
            self.class_names,
        )
        about["run"] = {
            "ema": self.ema_decay is not None,
            "skipped_steps": self.skipped,
            "world_size": self.trainer.world_size,
            "batch_of_all_ranks": self.batch_of_all_ranks,
        }
        checkpoint[NETWORK_KEY] = about

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        about = checkpoint[NETWORK_KEY]
        self.check_checkpoint(about)
        if self.trainer.state.fn == "fit":
            self.skipped_steps, self.skipped_in_a_row = about["run"]["skipped_steps"]
            self.report_other_devices(about["run"], checkpoint["loops"]["fit_loop"])

    def check_checkpoint(self, about: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network or tokenizer.

        Raises:
            InputError: naming the first field that differs.
        """
        kept = {True: "kept", False: "not kept"}
        theirs = about["network"] | {
            "tokenizer": about["tokenizer"]["fingerprint"],
            "ema_decay (an average of the weights)": kept[about["run"]["ema"]],
        }
        ours = asdict(self.network_config) | {
            "tokenizer": self.tokenizer_fingerprint,
            "ema_decay (an average of the weights)": kept[self.ema_decay is not None],
        }
        for name in ours:
            if ours[name] != theirs.get(name):
                raise InputError(
                    f"--ckpt_path is of another configuration: {name} is {theirs.get(name)} in the checkpoint and "
                    f"{ours[name]} in this run"
                )

    def report_other_devices(self, run: dict[str, Any], fit_loop: dict[str, Any]) -> None:
        """Say what is different where the run goes on with other devices or batches, and keep its place in the epoch.

        Samples come in the same order whatever the devices. Lightning counts batches, so its count is made to fit.
        """
        before, now = run["batch_of_all_ranks"], self.batch_of_all_ranks
        if before != now:
            current = fit_loop["epoch_loop.batch_progress"]["current"]
            left_over = current["completed"] * before % now
            for name, batches in current.items():
                current[name] = batches * before // now
            rank_zero_info(
                f"resuming with batches of {now} images over all ranks, not {before}: the order of the samples is the "
                f"same, {left_over} of them come again; learning rate, steps in an epoch and dropped labels follow "
                f"the new batch"
            )
        elif run["world_size"] != self.trainer.world_size:
            rank_zero_info(
                f"resuming on {self.trainer.world_size} ranks, not {run['world_size']}: batches and dropped labels are "
                f"the same; drop path draws other numbers, sums round differently"
            )
