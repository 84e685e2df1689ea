"""Parameter groups, and schedules of learning rate and weight decay (VAR's published recipe).

Both schedules are pure functions of the step, so they need no checkpoint and a resumed run cannot drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mvar.errors import InputError, require_in
from lightning_mvar.models.parameters import is_block_matrix
from lightning_mvar.training.muon import MuonAdamW


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon and AdamW, with their schedules.

    Args:
        base_lr: learning rate for a global batch of 256; the peak is base_lr * batch / 256.
        beta1: decay rate of AdamW's first moment.
        beta2: decay rate of AdamW's second moment.
        weight_decay: weight decay at the first step.
        final_weight_decay: weight decay at the last step, reached along a cosine; equal to `weight_decay` if not given.
        warmup: share of all steps spent in linear warm-up.
        plateau: share of the steps after warm-up that stay at the peak.
        initial_lr_ratio: learning rate at the first step, divided by the peak.
        final_lr_ratio: learning rate at the last step, divided by the peak.
        muon: train the matrices of the blocks, or the convolutions of a tokenizer, with Muon, and all other parameters
            with AdamW.
        momentum: decay rate of Muon's momentum.
    """

    base_lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    warmup: float = 0.02
    plateau: float = 0.05
    initial_lr_ratio: float = 0.005
    final_lr_ratio: float = 0.1
    muon: bool = False
    momentum: float = 0.95

    def __post_init__(self) -> None:
        prefix = "optimizer."
        require_in("(0, inf)", prefix, base_lr=self.base_lr)
        require_in("[0, 1)", prefix, beta1=self.beta1, beta2=self.beta2, momentum=self.momentum)
        require_in("[0, inf)", prefix, weight_decay=self.weight_decay, final_weight_decay=self.final_weight_decay)
        require_in("[0, 1]", prefix, warmup=self.warmup, plateau=self.plateau)
        require_in("[0, 1]", prefix, initial_lr_ratio=self.initial_lr_ratio, final_lr_ratio=self.final_lr_ratio)

    def learning_rate(self, step: int, total_steps: int, global_batch: int) -> float:
        """Returns the learning rate: linear warm-up, plateau, then linear decay to `final_lr_ratio` of the peak."""
        peak = self.base_lr * global_batch / 256
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return peak * (self.initial_lr_ratio + (1 - self.initial_lr_ratio) * step / warmup_steps)
        progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
        if progress < self.plateau or self.plateau == 1:
            return peak
        return peak * (self.final_lr_ratio + (1 - self.final_lr_ratio) * (1 - progress) / (1 - self.plateau))

    def decay(self, step: int, total_steps: int) -> float:
        """Returns the weight decay at `step`, along a cosine from `weight_decay` to `final_weight_decay`."""
        end = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        progress = min(step / max(total_steps - 1, 1), 1.0)
        return end + (self.weight_decay - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


def parameter_groups(
    model: nn.Module, undecayed_names: tuple[str, ...] = (), muon: bool = False
) -> list[dict[str, Any]]:
    """Splits trained parameters into groups with and without decay: 1-d ones and the given suffixes do not decay.

    A group without parameters is left out, because torch.distributed.checkpoint would lose its options. With `muon`,
    the last group holds matrices and convolutions, see `is_block_matrix`; it is empty if none are trained.
    """
    groups: tuple[list[nn.Parameter], ...] = ([], [], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(undecayed_names)
            groups[2 if muon and is_block_matrix(name, parameter) else 0 if decays else 1].append(parameter)
    decayed, undecayed, matrices = groups
    split = [{"params": decayed, "decays": True}, {"params": undecayed, "decays": False, "weight_decay": 0.0}]
    return without_empty(split) + ([{"params": matrices, "decays": True}] if muon else [])


def without_empty(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops groups without parameters, which states of older versions may have."""
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, fused: bool = True, undecayed_names: tuple[str, ...] = ()
) -> torch.optim.Optimizer:
    """Builds the optimizer over all groups; `apply_schedule` sets learning rate and decay before each step.

    Raises:
        InputError: if Muon has nothing to train.
    """
    groups, betas = parameter_groups(model, undecayed_names, config.muon), (config.beta1, config.beta2)
    optimizer: torch.optim.Optimizer
    if config.muon:
        *others, matrices = groups
        if not matrices["params"]:
            raise InputError("optimizer.muon has nothing to train: all matrices and convolutions are frozen")
        optimizer = MuonAdamW(others, matrices, config.base_lr, betas, config.momentum, fused)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.base_lr, betas=betas, fused=fused)
    optimizer.register_load_state_dict_pre_hook(adapt_groups)
    return optimizer


def adapt_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Drops empty groups from a state to load and sets this run's `fused` flag, because the precision may differ."""
    fused = optimizer.defaults["fused"]
    return state | {"param_groups": [group | {"fused": fused} for group in without_empty(state["param_groups"])]}


def skip_step_unless(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Makes the next step leave weights and moments unchanged if `finite`, () bool on the device, is false.

    Uses the flag with which GradScaler skips steps of a fused optimizer, without synchronization. An optimizer that is
    not fused runs with a GradScaler, which skips such steps itself.
    """
    if optimizer.param_groups[0]["fused"]:
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]


def apply_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, total_steps: int, global_batch: int
) -> tuple[float, float]:
    """Sets the learning rate and weight decay of all groups for `step` and returns both.

    A group's learning rate is multiplied by its `lr_factor`, if it has one.
    """
    lr, weight_decay = config.learning_rate(step, total_steps, global_batch), config.decay(step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return lr, weight_decay
