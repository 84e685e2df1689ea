"""Base of both Lightning modules: schedules, skipped steps, reproducible random numbers, weight averaging."""

from __future__ import annotations

import json
import math
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_mvar.errors import DivergedError, InputError, require_in
from lightning_mvar.training.lightning_internals import correct_logged_step, loggers_see_this_step, training_loader
from lightning_mvar.training.optim import OptimizerConfig, apply_schedule, build_optimizer, skip_step_unless
from lightning_mvar.training.run_state import check_tensors
from lightning_mvar.training.strategies import full_tensor, local_shards

SKIPPED_STEPS = "skipped_steps"  # folder in a run's folder that lists the images of skipped steps


class AsyncScalar:
    """A scalar being copied to the host without blocking; `float` waits for the copy."""

    def __init__(self, scalar: Tensor) -> None:
        self.value, self.event = scalar.detach().to("cpu", non_blocking=scalar.is_cuda), None
        if scalar.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def __float__(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


class PendingStep(NamedTuple):
    """A queued optimizer step; the device skips it if its gradients are not finite."""

    step: int
    epoch: int
    batches: list[Any]
    gradient_norm: AsyncScalar


@runtime_checkable
class TrainingData(Protocol):
    """What modules use of this package's datamodules; other data need not provide it."""

    batch_size: int  # images per rank

    def keys(self, batch: Any) -> list[str]: ...  # names of the images in a batch


class ScheduledModule(L.LightningModule):
    """Trains with the schedules of `OptimizerConfig`, in exactly reproducible steps.

    Before each batch, the generators are seeded from (seed, epoch, batch, rank), so a resumed run draws the same random
    numbers as an uninterrupted one. A step whose gradients are not finite is skipped on all ranks.

    The host does not wait for the GPU to finish a step, except under float16 loss scaling: it learns one step later
    whether a step was skipped, and reads values only in steps that are logged (`trainer.log_every_n_steps`).

    Args:
        optimizer: the optimizer and its schedules.
        max_skipped_steps: number of consecutive skipped steps after which training stops.
    """

    undecayed: tuple[str, ...] = ()  # name suffixes of parameters without weight decay; 1-d parameters never decay

    def __init__(self, optimizer: OptimizerConfig, max_skipped_steps: int) -> None:
        super().__init__()
        require_in("[1, inf)", "model.", max_skipped_steps=max_skipped_steps)
        self.optimizer_config, self.max_skipped_steps = optimizer, max_skipped_steps
        self.seed = torch.initial_seed()
        self.skipped_steps, self.skipped_in_a_row = 0, 0
        self.in_optimizer_step = False  # while the state is inconsistent and cannot be saved
        self.saves_alone = False  # while this rank saves without the others, so no collective may run
        self.batches: list[Any] = []  # of the current optimizer step
        self.pending_step: PendingStep | None = None  # the last step, until it is known whether it was skipped
        self.gradient_norms: dict[str, Tensor] = {}  # in the current step, on the device; keys as in `clip_groups`
        self.gradients_finite = torch.tensor(True)  # in the current step, on the device

    @property
    def data(self) -> TrainingData | None:
        """The datamodule, if it is one of this package."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        return datamodule if isinstance(datamodule, TrainingData) else None

    @property
    def batch_size(self) -> int:
        """Images per rank and batch, from the datamodule or the DataLoader.

        Raises:
            InputError: if the DataLoader has no batch size.
        """
        size = getattr(self.data or training_loader(self.trainer), "batch_size", None)
        if size is None:
            raise InputError("cannot scale the learning rate: the DataLoader has no batch_size")
        return int(size)

    def keys(self, batch: Any) -> list[str]:
        """Returns the names of the images in a batch; an empty list if the images have no names."""
        return [] if self.data is None else self.data.keys(batch)

    @property
    def lr(self) -> float:
        """Peak learning rate, under the name that Lightning's LearningRateFinder expects."""
        return self.optimizer_config.base_lr * self.global_batch / 256

    @lr.setter
    def lr(self, peak: float) -> None:
        base_lr = peak * 256 / self.global_batch
        self.optimizer_config = replace(self.optimizer_config, base_lr=base_lr)
        rank_zero_info(f"the peak learning rate is now {peak:.3g}: --model.optimizer.base_lr {base_lr:.3g}")

    def setup(self, stage: str) -> None:
        """Checks the precision.

        Raises:
            InputError: if weights are stored in half precision, which loses small updates and exponentiates errors of
                the decays over the sequence.
        """
        if (precision := self.trainer.precision) in ("bf16-true", "16-true"):
            mixed = precision.replace("true", "mixed")
            raise InputError(f"--trainer.precision {precision} does not keep the weights in float32; use {mixed}")
        self.seed = self.trainer.strategy.broadcast(self.seed)
        # The hook takes precedence over that of a datamodule; this package's datamodules have none.
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer`")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks weights and moments before they are restored; FSDP2 restores them earlier and has checked them.

        Raises:
            InputError: if they do not fit this run, or are not finite.
        """
        if "state_dict" in checkpoint:
            optimizers = [self.configure_optimizers()] if self.trainer.state.fn == "fit" else []
            check_tensors(checkpoint, self, optimizers, f"--ckpt_path {self.trainer.ckpt_path}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, self.optimizer_config, self.fused, self.undecayed)

    @property
    def fused(self) -> bool:
        """Whether the optimizer is fused; not with float16 loss scaling, which fused kernels bypass."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is None

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the run, from max_steps or max_epochs, whichever ends it first.

        Reading `trainer.estimated_stepping_batches` instead would drop the restored position of the loader.
        """
        trainer, limits = self.trainer, []
        max_epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
        if trainer.max_steps > 0:
            limits.append(trainer.max_steps)
        if max_epochs > 0 and batches != math.inf:  # infinite if the loader has no length
            limits.append(max_epochs * -(-int(batches) // trainer.accumulate_grad_batches))
        if not limits:
            raise InputError("the learning-rate schedule needs an end: set --trainer.max_steps or --trainer.max_epochs")
        return min(limits)

    @property
    def batch_of_all_ranks(self) -> int:
        """Images per batch over all ranks."""
        return self.batch_size * self.trainer.world_size

    @property
    def global_batch(self) -> int:
        """Images per optimizer step: all ranks, all accumulated batches."""
        return self.batch_of_all_ranks * self.trainer.accumulate_grad_batches

    @property
    def is_logging_step(self) -> bool:
        """Whether the current step is logged."""
        return loggers_see_this_step(self.trainer)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Logs as Lightning does, but keeps numbers on the host: Lightning would copy them to the device and wait."""
        if isinstance(value, int | float) and not kwargs.get("sync_dist"):
            value = torch.tensor(float(value))
        super().log(name, value, *args, **kwargs)

    def log_scalars(self, scores: dict[str, Tensor]) -> None:
        """Copies scalars to the host once and logs them; Lightning's progress bar would read them in every step."""
        for name, value in zip(scores, torch.stack([*scores.values()]).cpu(), strict=True):
            self.log(name, value, prog_bar=name == "train/loss")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_generators(self.derive_seed(batch_idx, self.global_rank))
        correct_logged_step(self.trainer, self.global_step)
        self.batches.append(batch)
        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        if self.trainer.lr_scheduler_configs:  # set by LearningRateFinder or StochasticWeightAveraging
            return
        step = (self.global_step, self.total_steps, self.global_batch)
        lr, weight_decay = apply_schedule(optimizer, self.optimizer_config, *step)
        if self.is_logging_step:
            self.log_dict({"train/lr": lr, "train/weight_decay": weight_decay})

    def seed_generators(self, seed: int) -> None:
        """Seeds the CPU and this device; `torch.manual_seed` would take milliseconds to record stack traces."""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def derive_seed(self, batch_idx: int, purpose: object) -> int:
        """Returns a 63-bit seed that depends only on (seed, epoch, batch) and `purpose`."""
        key = f"{self.seed}-{self.current_epoch}-{batch_idx}-{purpose}"
        return random.Random(key).getrandbits(63)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.resolve_pending_step()
        self.in_optimizer_step = True
        norms = {}
        for name, part in self.clip_groups().items():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            self.gradient_norms[name] = torch.nn.utils.get_total_norm(gradients)
            norms[f"train/{name}"] = full_tensor(self.gradient_norms[name])
        norm = torch.stack([*norms.values()]).amax()  # not finite if any norm is not
        self.gradients_finite = norm.isfinite()
        skip_step_unless(self.gradients_finite, optimizer)
        self.pending_step = PendingStep(self.global_step, self.current_epoch, self.batches, AsyncScalar(norm))
        self.batches = []
        if self.is_logging_step:
            self.resolve_pending_step()
            self.log_scalars(norms | {"train/skipped_steps": norm.new_tensor(self.skipped_steps)})

    def clip_groups(self) -> dict[str, nn.Module]:
        """Modules whose gradients are clipped separately, keyed by the name under which their norm is logged."""
        return {"grad_norm": self}

    def resolve_pending_step(self) -> None:
        """Determines whether the last step was skipped. All ranks agree, because the norm is the same on all.

        Raises:
            DivergedError: after `max_skipped_steps` skipped steps in a row.
        """
        pending, self.pending_step = self.pending_step, None
        if pending is None:
            return
        if math.isfinite(float(pending.gradient_norm)):
            self.skipped_in_a_row = 0
        else:
            self.report_skipped_step(pending)

    def on_train_end(self) -> None:
        self.resolve_pending_step()

    @property
    def skip_counts(self) -> tuple[int, int]:
        """Number of skipped steps so far, and how many of them were the last ones, without a step in between."""
        self.resolve_pending_step()
        return self.skipped_steps, self.skipped_in_a_row

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norms from `on_before_optimizer_step`, or by value, with every strategy.

        Lightning's own clipping refuses fused optimizers in mixed precision, because with float16 loss scaling they
        unscale the gradients themselves. In that case, our optimizer is not fused and the gradients are already
        unscaled.
        """
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
            return
        for name, part in self.clip_groups().items():
            torch.nn.utils.clip_grads_with_norm_(part.parameters(), gradient_clip_val, self.gradient_norms[name])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_step()
        self.in_optimizer_step = False

    def after_step(self) -> None:
        """Hook that runs after each optimizer step, even if it was skipped; see `gradients_finite`."""

    def report_skipped_step(self, pending: PendingStep) -> None:
        """Counts a skipped step and records the names of its images, on every rank; see `resolve_pending_step`."""
        step, norm = pending.step, float(pending.gradient_norm)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        folder = Path(self.trainer.default_root_dir) / SKIPPED_STEPS
        folder.mkdir(parents=True, exist_ok=True)
        keys = [key for batch in pending.batches for key in self.keys(batch)]
        record = {"step": step, "epoch": pending.epoch, "gradient_norm": str(norm), "keys": keys}
        with open(folder / f"rank{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        rank_zero_warn(
            f"step {step} is skipped: its gradient norm is {norm} ({self.skipped_steps} skipped so far, "
            f"{self.skipped_in_a_row} in a row); its images are listed in {folder}"
        )
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise DivergedError(
                f"training has diverged: {self.skipped_in_a_row} steps in a row had gradients that are not finite, the "
                f"last one step {step}; their images are listed in {folder}. The last checkpoint is kept: lower "
                f"--model.optimizer.base_lr or --trainer.gradient_clip_val, or repair the data, then add --resume"
            )


def warm_up_decay(decay: float, step: int) -> float:
    """Limits the decay of a weight average to (1 + step) / (10 + step), which matters in the first steps (from 0)."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(average: nn.Module, weights: nn.Module, decay: float, finite: Tensor) -> None:
    """Moves a weight average towards the weights; each rank updates its own shards.

    Args:
        average: module that holds the average.
        weights: module with the same parameters.
        decay: share of the average that is kept.
        finite: () bool on the device; if false, the average is not changed.
    """
    averages, targets = local_shards(list(average.parameters())), local_shards(list(weights.parameters()))
    # a + (1 - decay) (w - a) is gradient ascent with gradient w and weight decay 1. The fused SGD kernels update all
    # parameters in one launch and read the flag on the device, as AdamW's do in `skip_step_unless`.
    torch._fused_sgd_(
        averages,
        targets,
        momentum_buffer_list=[],
        weight_decay=1.0,
        momentum=0.0,
        lr=1 - decay,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=(~finite).float(),
    )
