"""Reads, loads and saves flat state dicts without executing code from a file."""

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

# Raised by the readers for truncated files and files of another format.
TENSOR_ERRORS = (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AssertionError, struct.error)


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes all parameters and buffers as .safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write(path, lambda temporary: save_file(weights, temporary))


def save_torch(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes a state dict with `torch.save`."""
    write(path, lambda temporary: torch.save(dict(state), temporary))


def write(path: Path, writer: Callable[[Path], None]) -> None:
    """Calls `writer` to create the file atomically.

    Raises:
        InputError: if the file cannot be written, for example because the disk is full.
    """
    with atomic_path(path) as temporary:
        try:
            writer(temporary)
        except (SafetensorError, RuntimeError) as error:  # both libraries wrap OSError
            raise OSError(first_line(error)) from error


def read_weights(path: Path) -> StateDict:
    """Reads a flat state dict from .safetensors.

    Raises:
        InputError: if the file is missing, damaged or of another format.
    """
    require_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({first_line(error)})") from error


def read_torch(path: Path) -> dict[str, Any]:
    """Reads a file of `torch.save` without executing code from it; tensors are memory-mapped and read on use.

    Raises:
        InputError: if the file is missing, damaged, of another format, or holds more than plain weights.
    """
    require_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's own message suggests weights_only=False
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
        raise InputError(f"{path} is a folder, not a weights file")
    if not path.is_file():
        raise InputError(f"{path} does not exist")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_strictly(module: Module, weights: Mapping[str, Tensor], source: object) -> Module:
    """Loads `weights` into `module` on the CPU, with exactly matching keys and shapes, and sets eval mode.

    Build `module` on the meta device, so that memory holds its weights once. Weights are copied, because those of a
    memory-mapped file would change, or crash the process, if the file is written to.

    Raises:
        InputError: naming the first keys that are missing, unexpected or of another shape.
    """
    expected = module.state_dict()
    check_state_dict(expected, weights, f"{source} does not fit {type(module).__name__}")
    copies = {name: weights[name].to("cpu", tensor.dtype, copy=True).contiguous() for name, tensor in expected.items()}
    module.load_state_dict(copies, assign=True)
    return module.eval()


def check_state_dict(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], message: str) -> None:
    """Raises InputError, starting with `message`, unless keys and shapes match."""
    problems = [f"missing {name}" for name in expected if name not in actual]
    problems += [f"unexpected {name}" for name in actual if name not in expected]
    problems += [
        f"{name} is {tuple(actual[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in actual and actual[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{message}: {'; '.join(problems[:3])}{more}")
