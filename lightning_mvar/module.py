"""Training a scale-by-scale network on tokens, teacher-forced (M-VAR, arXiv 2411.10433, section 4; VAR's recipe)."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_mvar.checkpoints import CHECKPOINT_KEY, describe, load_tokenizer
from lightning_mvar.data.loader import TokenBatch
from lightning_mvar.errors import DivergedError, InputError
from lightning_mvar.models.mvar import MVAR, Block, MVARConfig
from lightning_mvar.optim import OptimizerConfig, apply_schedule, build_optimizer, skip_unless
from lightning_mvar.sampling import check_pair
from lightning_mvar.strategies import FSDP2Strategy, build, local, plain, recompute_in_backward, total_norm
from lightning_mvar.tokenizer.tokenizer import Tokenizer


class Arriving:
    """A number on its way from the device to the host, which goes on meanwhile."""

    def __init__(self, number: Tensor) -> None:
        self.value, self.event = number.detach().to("cpu", non_blocking=number.is_cuda), None
        if number.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def __float__(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


class Taken(NamedTuple):
    """An optimizer step that the device has been given to take, unless its gradients are not finite."""

    step: int
    epoch: int
    batches: list[Any]
    gradient_norm: Arriving


class ScheduledModule(L.LightningModule):
    """AdamW whose learning rate and weight decay follow `OptimizerConfig`, and steps that repeat exactly.

    Every batch begins with random numbers that depend on (seed, epoch, batch, rank) alone, so a resumed run draws what
    an uninterrupted one would have drawn. A step whose gradients are not finite is skipped on all ranks.

    The host does not wait for a GPU to finish a step, but where float16's loss scaling makes it: whether a step was
    skipped is asked one step later, and what is logged is read in those steps only that the loggers see
    (`trainer.log_every_n_steps`).

    Args:
        optimizer: AdamW and its schedules.
        max_skipped_steps: training ends after so many skipped steps in a row.
    """

    def __init__(self, optimizer: OptimizerConfig, max_skipped_steps: int) -> None:
        super().__init__()
        if max_skipped_steps < 1:
            raise InputError(f"model.max_skipped_steps must be at least 1, got {max_skipped_steps}")
        self.optimizer_config, self.max_skipped_steps = optimizer, max_skipped_steps
        self.seed = torch.initial_seed()
        self.skipped_steps, self.skipped_in_a_row = 0, 0
        self.stepping = False  # between the last gradient and the end of the step no state is worth saving
        self.batches: list[Any] = []  # of the step under way
        self.taken: Taken | None = None  # the last step, until it is known whether it was skipped
        self.gradient_norm, self.finite = torch.tensor(0.0), torch.tensor(True)  # of this step, on the device

    def setup(self, stage: str) -> None:
        self.seed = self.trainer.strategy.broadcast(self.seed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16, which fused kernels would bypass
        return build_optimizer(self, self.optimizer_config, fused=scaler is None)

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

    @property
    def batch_of_all_ranks(self) -> int:
        per_rank: int = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return per_rank * self.trainer.world_size

    @property
    def global_batch(self) -> int:
        """Images of one optimizer step."""
        return self.batch_of_all_ranks * self.trainer.accumulate_grad_batches

    @property
    def logs_now(self) -> bool:
        """Whether the loggers see the step under way."""
        return bool(self.trainer._logger_connector.should_update_logs)

    def log_now(self, scores: dict[str, Tensor]) -> None:
        """Log numbers of this step; on the host, because Lightning reads those of its progress bar in every step."""
        for name, value in zip(scores, torch.stack([*scores.values()]).cpu(), strict=True):
            self.log(name, value, prog_bar=name == "train/loss")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_generators(self.random_key(batch_idx, self.global_rank))
        # Lightning counts one too many after a run is resumed right after a validation, and logs under that number.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step
        self.batches.append(batch)
        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        step = (self.global_step, self.total_steps, self.global_batch)
        lr, weight_decay = apply_schedule(optimizer, self.optimizer_config, *step)
        if self.logs_now:
            self.log_dict({"train/lr": lr, "train/weight_decay": weight_decay})

    def seed_generators(self, seed: int) -> None:
        """Of the CPU and of this device; `torch.manual_seed` takes milliseconds to note who asked for which device."""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def random_key(self, batch_idx: int, purpose: object) -> int:
        """A seed that depends on (seed, epoch, batch) and the purpose alone."""
        key = f"{self.seed}-{self.current_epoch}-{batch_idx}-{purpose}"
        return random.Random(key).getrandbits(63)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.settle()
        self.stepping = True
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.gradient_norm = total_norm(gradients, self.trainer.strategy)
        norm = plain(self.gradient_norm)
        self.finite = norm.isfinite()
        skip_unless(self.finite, optimizer)
        self.taken = Taken(self.global_step, self.current_epoch, self.batches, Arriving(norm))
        self.batches = []
        if self.logs_now:
            self.settle()
            self.log_now({"train/grad_norm": norm, "train/skipped_steps": norm.new_tensor(self.skipped_steps)})

    def settle(self) -> None:
        """Find out whether the last step was skipped; on all ranks alike, for the norm is the same on all.

        Raises:
            DivergedError: after `max_skipped_steps` in a row.
        """
        taken, self.taken = self.taken, None
        if taken is None:
            return
        if math.isfinite(float(taken.gradient_norm)):
            self.skipped_in_a_row = 0
        else:
            self.report_skipped_step(taken)

    def on_train_end(self) -> None:
        self.settle()

    @property
    def skipped(self) -> tuple[int, int]:
        """Steps skipped so far, and of those the ones in a row up to now."""
        self.settle()
        return self.skipped_steps, self.skipped_in_a_row

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that is known already, under every strategy."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.gradient_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_step()
        self.stepping = False

    def after_step(self) -> None:
        """Called after every optimizer step; `finite` tells the device whether it was skipped."""

    def report_skipped_step(self, taken: Taken) -> None:
        """Count the step and write down which images it was made of, on every rank; see `settle`."""
        step, norm = taken.step, float(taken.gradient_norm)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        folder = Path(self.trainer.default_root_dir) / "skipped_steps"
        folder.mkdir(parents=True, exist_ok=True)
        keys = [key for batch in taken.batches for key in self.trainer.datamodule.keys(batch)]  # type: ignore[attr-defined]
        about = {"step": step, "epoch": taken.epoch, "gradient_norm": str(norm), "keys": keys}
        with open(folder / f"rank{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(about) + "\n")
        rank_zero_warn(
            f"step {step} is skipped: the norm of its gradients is {norm} (skipped {self.skipped_steps}, "
            f"{self.skipped_in_a_row} in a row); its images are named in {folder}"
        )
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise DivergedError(
                f"training ends: the gradients of {self.skipped_in_a_row} steps in a row were not finite, the last of "
                f"step {step}; the images are named in {folder}. The last checkpoint is kept: lower "
                f"--model.optimizer.base_lr or --trainer.gradient_clip_val, or repair the data, and go on with --resume"
            )


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

    def configure_model(self) -> None:
        """Build the network, in parts that may be sharded at once: see `build`."""
        if hasattr(self, "network"):
            return
        strategy = self.trainer.strategy if self._trainer is not None else None
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
            scale_inputs = self.tokenizer.scale_inputs(batch.tokens)
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
        sides = self.network_config.schedule.side_lengths
        return {f"{prefix}/{side}": part.mean() for side, part in zip(sides, self.per_scale(losses), strict=True)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        about = describe(
            self.network_config,
            str(Path(self.tokenizer_path).resolve()),
            self.tokenizer_fingerprint,
            datamodule.class_names,
        )
        about["run"] = {
            "ema": self.ema_decay is not None,
            "skipped_steps": self.skipped,
            "world_size": self.trainer.world_size,
            "batch_of_all_ranks": self.batch_of_all_ranks,
        }
        checkpoint[CHECKPOINT_KEY] = about

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        about = checkpoint[CHECKPOINT_KEY]
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
