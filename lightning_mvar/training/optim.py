"""Parameter groups, and learning rate and weight decay as functions of the step (VAR's published recipe).

Both schedules are pure functions of the step: nothing to checkpoint, and a resumed run cannot drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mvar.errors import InputError

PLATEAU = 0.05  # share of the steps after warm-up at the peak


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedules.

    Args:
        base_lr: learning rate for a global batch of 256; the peak is base_lr * batch / 256.
        beta1: of AdamW.
        beta2: of AdamW.
        weight_decay: at the first step.
        final_weight_decay: at the last step, reached by a cosine; equal to `weight_decay` where not given.
        warmup: share of all steps spent in linear warm-up.
        initial_lr_ratio: learning rate at the first step over the peak.
        final_lr_ratio: learning rate at the last step over the peak.
    """

    base_lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    warmup: float = 0.02
    initial_lr_ratio: float = 0.005
    final_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.base_lr <= 0:
            raise InputError(f"optimizer.base_lr must be positive, got {self.base_lr}")
        for name in ("warmup", "initial_lr_ratio", "final_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"optimizer.{name} must be in [0, 1], got {getattr(self, name)}")

    def learning_rate(self, step: int, total_steps: int, global_batch: int) -> float:
        """Linear warm-up, a plateau, then linear to `final_lr_ratio` of the peak at the last step."""
        peak = self.base_lr * global_batch / 256
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return peak * (self.initial_lr_ratio + (1 - self.initial_lr_ratio) * step / warmup_steps)
        progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
        if progress < PLATEAU:
            return peak
        return peak * (self.final_lr_ratio + (1 - self.final_lr_ratio) * (1 - progress) / (1 - PLATEAU))

    def decay(self, step: int, total_steps: int) -> float:
        """Cosine from `weight_decay` to `final_weight_decay`."""
        end = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        progress = min(step / max(total_steps - 1, 1), 1.0)
        return end + (self.weight_decay - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, undecayed_names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Splits parameters into two groups: no decay on 1-d ones (biases, norms) and on those with the given endings."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (undecayed if parameter.ndim <= 1 or name.endswith(undecayed_names) else decayed).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": undecayed, "decays": False, "weight_decay": 0.0}]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, fused: bool = True, undecayed_names: tuple[str, ...] = ()
) -> torch.optim.Optimizer:
    """AdamW over the two groups; `apply_schedule` sets learning rate and decay before every step."""
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(parameter_groups(model, undecayed_names), lr=config.base_lr, betas=betas, fused=fused)
    optimizer.register_load_state_dict_pre_hook(keep_fused)
    return optimizer


def keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to load, to step on as this optimizer does: a run may go on in another precision."""
    fused = optimizer.defaults["fused"]
    return state | {"param_groups": [group | {"fused": fused} for group in state["param_groups"]]}


def skip_unless(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Let the coming step change neither weights nor moments where `finite`, () bool on the device, is false.

    As GradScaler tells a fused optimizer, so that only the device has to know; one that is not fused belongs to a
    GradScaler, which skips such steps itself.
    """
    if optimizer.param_groups[0]["fused"]:
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]


def apply_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, total_steps: int, global_batch: int
) -> tuple[float, float]:
    """Set every group's learning rate and decay for `step`; returns both.

    A group may have an `lr_factor`, by which its learning rate is another one.
    """
    lr, weight_decay = config.learning_rate(step, total_steps, global_batch), config.decay(step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return lr, weight_decay
