"""Flat state dicts: from files, into modules, and back. Nothing here ever executes code from a file."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path

StateDict = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

# What the readers raise on a file that is not theirs, or is cut short anywhere.
TENSOR_ERRORS = (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AssertionError, struct.error)


def save_weights(module: nn.Module, path: Path) -> None:
    """Write all parameters and buffers as .safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write(path, lambda temporary: save_file(weights, temporary))


def save_torch(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as `torch.save` does."""
    write(path, lambda temporary: torch.save(dict(state), temporary))


def write(path: Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` make the file, whole or not at all.

    Raises:
        InputError: if it cannot be written, for instance because the disk is full.
    """
    with atomic_path(path) as temporary:
        try:
            writer(temporary)
        except (SafetensorError, RuntimeError) as error:  # both libraries have their own words for an OSError
            raise OSError(first_line(error)) from error


def read_weights(path: Path) -> StateDict:
    """A flat state dict from .safetensors.

    Raises:
        InputError: if the file is missing or is something else.
    """
    require_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({first_line(error)})") from error


def read_torch(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, without running any code from the file; tensors are read when they are used.

    Raises:
        InputError: if the file is missing, is something else, or holds more than plain weights.
    """
    require_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's own message recommends to run the code
        raise InputError(
            f"{path} is damaged or not a file of plain weights (it holds other objects or code)"
        ) from error
    except TENSOR_ERRORS as error:
        raise InputError(f"{path} is damaged or not a file of plain weights ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def require_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file of weights")
    if not path.is_file():
        raise InputError(f"{path} does not exist")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_strictly(module: Module, weights: Mapping[str, Tensor], source: object) -> Module:
    """Give `module` all of `weights` and no others, on the CPU, and put it in eval mode.

    `module` is best built on the meta device: then memory holds its weights once. They are copied, because those
    of a mapped file would change, or crash the process, when somebody writes to that file.

    Raises:
        InputError: naming the first keys that are missing, too many, or of another shape.
    """
    own = module.state_dict()
    check_same(own, weights, f"{source} does not fit {type(module).__name__}")
    copies = {name: weights[name].to("cpu", tensor.dtype, copy=True).contiguous() for name, tensor in own.items()}
    module.load_state_dict(copies, assign=True)
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
