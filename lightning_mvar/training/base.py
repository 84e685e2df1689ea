"""What training a network and training a tokenizer share: schedules, skipped steps, random numbers that repeat."""

from __future__ import annotations

import json
import math
import random
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_mvar.errors import DivergedError, InputError
from lightning_mvar.training.lightning_internals import correct_logged_step, loggers_see_this_step
from lightning_mvar.training.optim import OptimizerConfig, apply_schedule, build_optimizer, skip_unless
from lightning_mvar.training.strategies import plain


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


class TrainingData(Protocol):
    """What a module asks of its datamodule."""

    batch_size: int  # images per rank and batch

    def keys(self, batch: Any) -> list[str]: ...  # names of a batch's images


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

    undecayed: tuple[str, ...] = ()  # ends of the names of parameters without weight decay, beside 1-d ones

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
        self.gradient_norms: dict[str, Tensor] = {}  # of this step, on the device, as `clipped_apart` names them
        self.finite = torch.tensor(True)  # of this step, on the device

    @property
    def data(self) -> TrainingData:
        """The datamodule: the one place where modules ask for it."""
        return cast(TrainingData, self.trainer.datamodule)  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        self.seed = self.trainer.strategy.broadcast(self.seed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16, which fused kernels would bypass
        return build_optimizer(self, self.optimizer_config, scaler is None, self.undecayed)

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
        return self.data.batch_size * self.trainer.world_size

    @property
    def global_batch(self) -> int:
        """Images of one optimizer step."""
        return self.batch_of_all_ranks * self.trainer.accumulate_grad_batches

    @property
    def logs_now(self) -> bool:
        """Whether the loggers see the step under way."""
        return loggers_see_this_step(self.trainer)

    def log_now(self, scores: dict[str, Tensor]) -> None:
        """Log numbers of this step; on the host, because Lightning reads those of its progress bar in every step."""
        for name, value in zip(scores, torch.stack([*scores.values()]).cpu(), strict=True):
            self.log(name, value, prog_bar=name == "train/loss")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_generators(self.random_key(batch_idx, self.global_rank))
        correct_logged_step(self.trainer, self.global_step)
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
        norms = {}
        for name, part in self.clipped_apart().items():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            self.gradient_norms[name] = torch.nn.utils.get_total_norm(gradients)
            norms[f"train/{name}"] = plain(self.gradient_norms[name])
        norm = torch.stack([*norms.values()]).amax()  # not finite if one is not
        self.finite = norm.isfinite()
        skip_unless(self.finite, optimizer)
        self.taken = Taken(self.global_step, self.current_epoch, self.batches, Arriving(norm))
        self.batches = []
        if self.logs_now:
            self.settle()
            self.log_now(norms | {"train/skipped_steps": norm.new_tensor(self.skipped_steps)})

    def clipped_apart(self) -> dict[str, nn.Module]:
        """What is clipped by a norm of its own, under the name that it is logged by."""
        return {"grad_norm": self}

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
        """Clip by the norms that are known already, under every strategy."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            for name, part in self.clipped_apart().items():
                torch.nn.utils.clip_grads_with_norm_(part.parameters(), gradient_clip_val, self.gradient_norms[name])
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
        keys = [key for batch in taken.batches for key in self.data.keys(batch)]
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
