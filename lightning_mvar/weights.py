"""Flat state dicts: from files, into modules, and back. Nothing here ever executes code from a file."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path

StateDict = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


def save_weights(module: nn.Module, path: Path) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary)


def read_weights(path: Path) -> StateDict:
    """A flat state dict from .safetensors."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error})") from error


def read_torch(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, without running any code from the file; tensors are read when they are used."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; it must be a checkpoint file or a folder that `export` wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or not a file of plain weights ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def load_strictly(module: Module, weights: Mapping[str, Tensor], source: object) -> Module:
    """Give `module` all of `weights` and no others, and put it in eval mode.

    The tensors themselves become the parameters, so `module` is best built on the meta device: then a network is in
    memory once. What was read from a mapped file stays mapped until it is moved or changed.

    Raises:
        InputError: naming the first keys that are missing, too many, or of another shape.
    """
    own = module.state_dict()
    check_same(own, weights, f"{source} does not fit {type(module).__name__}")
    module.load_state_dict({name: weights[name].to(own[name].dtype) for name in own}, assign=True)
    return module.eval()


def check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], complaint: str) -> None:
    """Raise InputError, beginning with `complaint`, unless keys and shapes are those expected."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{complaint}: {'; '.join(problems[:3])}{more}")
