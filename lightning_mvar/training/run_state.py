"""Checks what Lightning restores from a checkpoint as it is, so that odd values do not surface later, as a traceback.

Without tensors, a checkpoint is compared with the state of this run, by which the types of all its fields are known;
its weights and moments are compared with the parameters of this run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.io.json_files import shown
from lightning_mvar.io.tensors import check_finite, check_kinds, check_state_dict, holds_ignored_objects

VERSION, OLDEST = "pytorch-lightning_version", Version("2.6")  # older files would be converted, entry by entry
STEPS = "epoch_loop.automatic_optimization.optim_progress"  # entry of the fit loop with the steps done
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # per parameter
MUON_STATE = ("momentum_buffer",)  # per matrix
OF_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers")  # entries that a checkpoint of weights alone lacks
SHARDED = ("state_dict", "optimizer_states")  # entries that the plain part of a sharded checkpoint lacks


def check_run_state(content: dict[str, Any], trainer: L.Trainer, loop: str, sharded: bool, source: str) -> None:
    """Checks the entries of a checkpoint that Lightning restores, except weights and moments.

    Args:
        content: what a checkpoint file holds, or the plain part of a sharded one.
        trainer: the trainer that is to restore it.
        loop: name of the trainer's loop that is restored; all entries are required for `fit_loop`.
        sharded: whether the checkpoint is sharded.
        source: names the checkpoint in messages.

    Raises:
        InputError: naming the first entry that is missing, or is not like that of this run.
    """
    if holds_ignored_objects(content):
        raise InputError(f"{source} holds other objects than plain data and tensors: it cannot be continued from")
    for name in ("loops", VERSION, "state_dict", *(OF_TRAINING if loop == "fit_loop" else ())):
        if name not in content and not (sharded and name in SHARDED):
            raise InputError(f"{source} is damaged: {name} is missing")
    check_version(content[VERSION], source)
    form = getattr(trainer, loop).state_dict()
    if loop == "fit_loop":  # which has its loader only once it runs
        form["state_dict"] = {"combined_loader": [{"epoch": 0, "samples": 0}]}
    try:
        for name in ("epoch", "global_step"):
            check_like(content.get(name), 0, name)
        check_like(content["loops"], {}, "loops")
        check_like(content["loops"].get(loop), form, f"loops.{loop}")
        check_like(content.get("lr_schedulers", []), [], "lr_schedulers")
        check_like(content.get("optimizer_states", []), [], "optimizer_states")
        check_callbacks(content.get("callbacks", {}), trainer)
        if loop == "fit_loop":
            steps = content["loops"][loop][STEPS]["optimizer"]["step"]["total"]["completed"]
            if content["global_step"] != steps:
                raise ValueError(f"global_step is {content['global_step']}, but {steps} steps are done")
    except ValueError as error:
        raise InputError(f"{source} is damaged: {error}") from error


def check_version(version: Any, source: str) -> None:
    try:
        known = isinstance(version, str) and Version(version) >= OLDEST
    except InvalidVersion:
        known = False
    if not known:
        raise InputError(f"{source} is damaged: {VERSION} is {shown(version)}, must be {OLDEST} or later")


def check_callbacks(states: Any, trainer: L.Trainer) -> None:
    """Raises ValueError unless states are dictionaries, and those of this package's callbacks like those of this run.

    Callbacks of Lightning have other values before `setup`, and some resume without a state of the same form.
    """
    check_like(states, {}, "callbacks")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        package = type(callback).__module__.partition(".")[0]
        if package not in ("lightning", "lightning_mvar") or callback.state_key not in states:
            continue
        saved = states[callback.state_key]
        path = f"callbacks.{type(callback).__name__}"
        check_like(saved, {}, path)
        if package == "lightning":
            continue
        form = callback.state_dict()
        if isinstance(best := saved.get("best_k_models"), dict):
            form["best_k_models"] = dict.fromkeys(best, torch.zeros(()))
        check_like(saved, form, path)


def check_like(value: Any, example: Any, path: str) -> None:
    """Raises ValueError unless a value has the types of an example, and a dictionary also its keys.

    An empty dictionary or list is an example of any. Integers are counts. None is an example of a score that is not
    known yet: a number, a tensor of one, or None.
    """
    if isinstance(example, dict) and isinstance(value, dict):
        for name in {**example, **value} if example else ():
            if (name in example) != (name in value):
                raise ValueError(f"{path}.{name} is {'missing' if name in example else 'unknown'}")
            check_like(value[name], example[name], f"{path}.{name}")
    elif isinstance(example, list | tuple) and isinstance(value, list | tuple):
        if example and len(value) != len(example):
            raise ValueError(f"{path} has {len(value)} entries, not {len(example)}")
        for i, (part, like) in enumerate(zip(value, example, strict=False)):
            check_like(part, like, f"{path}[{i}]")
    elif not LIKE[type(example)](value):
        raise ValueError(f"{path} is {shown(value)}; it must be like {shown(example)}")


def is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < torch.finfo(torch.float64).max


LIKE: dict[type, Callable[[Any], bool]] = {  # type of an example: check
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and 0 <= value < 2**63,
    float: is_number,
    str: lambda value: isinstance(value, str),
    Tensor: is_scalar,
    type(None): lambda value: value is None or is_number(value) or is_scalar(value),
    **dict.fromkeys((dict, list, tuple), lambda value: False),
}


def check_tensors(
    content: dict[str, Any], module: L.LightningModule, optimizers: list[torch.optim.Optimizer], source: str
) -> None:
    """Checks weights and moments of a checkpoint file.

    Args:
        content: what the file holds, except for what `check_run_state` checks.
        module: the module that is to restore the weights.
        optimizers: those that are to restore the moments, over parameters of the module.
        source: names the checkpoint in messages.

    Raises:
        InputError: naming the first tensor that does not fit, or is not finite.
    """
    weights, states = content["state_dict"], content.get("optimizer_states", [])
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{source} is damaged: state_dict must hold tensors by name")
    expected = module.state_dict()
    if module.strict_loading:
        check_state_dict(expected, weights, f"{source} does not fit this run")
    check_kinds(expected, weights, source)
    check_finite(weights, source)
    try:
        if optimizers and len(states) != len(optimizers):
            raise ValueError(f"optimizer_states has {len(states)} entries, not {len(optimizers)}")
        for i, (optimizer, saved) in enumerate(zip(optimizers, states, strict=False)):
            check_optimizer(saved, optimizer, f"optimizer_states[{i}]")
    except ValueError as error:
        raise InputError(f"{source} is damaged: {error}") from error


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, path: str) -> None:
    """Raises ValueError unless a state fits this optimizer, AdamW or `MuonAdamW`, and is finite."""
    check_like(saved, {"state": {}, "param_groups": []}, path)
    groups = [group for group in saved["param_groups"] if not isinstance(group, dict) or group.get("params") != []]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"{path} has {len(groups)} groups of parameters, not {len(optimizer.param_groups)}")
    parameters: dict[Any, tuple[Tensor, tuple[str, ...]]] = {}  # by index in the checkpoint, with names of the state
    for i, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        check_group(group, own, optimizer.defaults, f"{path}.param_groups[{i}]")
        names = MUON_STATE if "momentum" in own else ADAMW_STATE
        parameters |= {index: (own["params"][j], names) for j, index in enumerate(group["params"])}
    for index, moments in saved["state"].items():
        if index not in parameters:
            raise ValueError(f"{path}.state has the unknown parameter {shown(index)}")
        check_moments(moments, *parameters[index], f"{path}.state.{index}")


def check_group(group: Any, own: dict[str, Any], defaults: dict[str, Any], path: str) -> None:
    """Raises ValueError unless a group has the options of this run's group, of the same types, and as many parameters.

    AdamW's flags must be equal, except `fused`, which is this run's own; another version of torch may lack some.
    """
    check_like(group, {}, path)
    for name, example in own.items():
        is_flag = example is None or isinstance(example, bool)
        if name == "fused" or (is_flag and name in defaults and name not in group):
            continue
        if name not in group:
            raise ValueError(f"{path}.{name} is missing")
        check_like(group[name], [0] * len(example) if name == "params" else example, f"{path}.{name}")
        if is_flag and group[name] is not example:
            raise ValueError(f"{path}.{name} is {shown(group[name])}, must be {example}")


def check_moments(moments: Any, parameter: Tensor, names: tuple[str, ...], path: str) -> None:
    check_like(moments, {}, path)
    for name in names:
        value = moments.get(name)
        shape = () if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
            raise ValueError(f"{path}.{name} is not a float tensor {tuple(shape)}")
    check_finite({name: moments[name] for name in names}, path)
