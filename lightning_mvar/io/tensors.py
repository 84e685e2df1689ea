"""Reads, loads and saves flat state dicts without executing code from a file."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, open_regular

StateDict = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

# Raised by the readers for truncated files and files of another format.
DAMAGE = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
# What trainers leave beside the weights in a checkpoint; see `Ignored`.
IGNORED = [
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "pathlib.WindowsPath",
    "argparse.Namespace",
]


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes all parameters and buffers as .safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write(path, lambda temporary: save_file(weights, temporary))


def save_lazily(shapes: Mapping[str, Tensor], read: Callable[[str], Tensor], path: Path) -> None:
    """Writes a .safetensors file of float32 tensors while they are computed, so that memory holds one at a time.

    The file equals that of `save_weights`.

    Args:
        shapes: tensors on the meta device, by name.
        read: returns the values of the tensor with a name, float32 on the CPU; called once per name.
        path: file to write, atomically.
    """
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + 4 * shapes[name].numel()
        header[name] = {"dtype": "F32", "shape": list(shapes[name].shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write_all(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for name in header:
                file.write(read(name).numpy().data)

    write(path, write_all)


def save_torch(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes a state dict with `torch.save`."""
    write(path, lambda temporary: torch.save(dict(state), temporary))


def write(path: Path, writer: Callable[[Path], None]) -> None:
    """Calls `writer` to create the file atomically.

    Raises:
        InputError: if the file cannot be written, for example because the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors makes files that only their owner reads
        try:
            writer(temporary)
            temporary.chmod(mode)
        except (SafetensorError, RuntimeError) as error:  # both libraries wrap OSError
            raise OSError(first_line(error)) from error


def read_weights(path: Path) -> StateDict:
    """Reads a flat state dict from .safetensors.

    Raises:
        InputError: if the file is missing, damaged or of another format.
    """
    require_weights(path)
    try:
        return load_file(path)
    except (SafetensorError, *DAMAGE) as error:
        hint = ": it is one of torch.save, name it .pth" if zipfile.is_zipfile(path) else ""
        raise InputError(f"{path} is damaged or not a safetensors file ({first_line(error)}){hint}") from error


def read_any(path: Path) -> dict[str, Any]:
    """Reads a .safetensors file or one of `torch.save`, as its content says; all tensors are stored completely.

    Raises:
        InputError: if it cannot be read; see `read_weights` and `read_torch`.
    """
    require_weights(path)
    with open_regular(path) as file:
        begin = file.read(9)
    safe = begin[8:] == b"{" or path.suffix == ".safetensors"  # torch takes the suffix at its word
    content = read_weights(path) if safe else read_torch(path)
    check_storage(tensors_in(content), path)
    return content


def read_torch(path: Path) -> dict[str, Any]:
    """Reads a file of `torch.save` without executing code from it; tensors are memory-mapped and read on use.

    Raises:
        InputError: if the file is missing, damaged, of another format, or holds more than plain weights.
    """
    require_weights(path)
    content = read_plain(path, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def read_plain(file: Path | IO[bytes], source: str) -> Any:
    """Reads what `torch.save` wrote, plain data and tensors on the CPU; nothing is decompressed.

    Args:
        file: a path, whose tensors are memory-mapped and read on use, or a stream.
        source: names the file in messages.

    Raises:
        InputError: if the file is damaged, of another format, or holds other objects or code.
    """
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip:
            refuse_compression(file)
        mapped = is_zip and isinstance(file, Path)
        with torch.serialization.safe_globals([(Ignored, name) for name in IGNORED]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # said again in the error, if there is one
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:  # torch's own message suggests weights_only=False
        raise InputError(
            f"{source} is damaged or not a file of plain weights (it holds other objects or code)"
        ) from error
    except (MemoryError, *DAMAGE) as error:  # torch allocates, but does not fill, what a string claims: up to 4 GB
        reason = str(error) if isinstance(error, InputError) else type(error).__name__
        raise InputError(f"{source} is damaged or not a file of plain weights ({reason})") from error
    check_layout(tensors_in(content), source)
    return content


class Ignored:
    """Placeholder for objects beside the weights (numpy scalars, paths), which are discarded."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def refuse_compression(file: Path | IO[bytes]) -> None:
    """Raises InputError if a zip archive is compressed, as none of `torch.save` is: a small file could fill memory."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError("it is compressed")
    if not isinstance(file, Path):
        file.seek(0)


def tensors_in(content: Any) -> list[Tensor]:
    """Returns the tensors in nested dictionaries and lists."""
    return [part for part in parts_of(content) if isinstance(part, Tensor)]


def holds_ignored_objects(content: Any) -> bool:
    """Returns whether `read_plain` has discarded objects of a file."""
    return any(isinstance(part, Ignored) for part in parts_of(content))


def parts_of(content: Any) -> list[Any]:
    """Returns all that nested dictionaries and lists hold, which may refer to each other."""
    parts, pending, seen = [], [content], set()
    while pending:
        part = pending.pop()
        if not isinstance(part, dict | list | tuple):
            parts.append(part)
        elif id(part) not in seen:
            seen.add(id(part))
            pending.extend(part.values() if isinstance(part, dict) else part)
    return parts


def check_layout(tensors: list[Tensor], source: str) -> None:
    """Raises InputError unless the tensors are plain ones on the CPU."""
    kinds = {(type(t) in (Tensor, nn.Parameter), t.device.type, t.layout) for t in tensors}
    if kinds - {(True, "cpu", torch.strided)}:
        raise InputError(f"{source} holds tensors without data, or of an unusual layout: save it as plain weights")


def check_storage(tensors: list[Tensor], source: object) -> None:
    """Raises InputError if tensors claim more bytes than are stored, for weights whose own shapes say what is built.

    Tied weights are stored once.
    """
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    if (needed := sum(t.numel() * t.element_size() for t in tensors)) > 2 * sum(stored.values()):
        raise InputError(
            f"{source} is damaged: its tensors have {needed} bytes, of which it holds {sum(stored.values())}"
        )


def require_weights(path: Path) -> None:
    """Raises InputError, with the remedy, if the path is not a file, or obviously not one of weights."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a weights file")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    with open_regular(path) as file:
        begin = file.read(512).lstrip().lower()
    if not begin:
        raise InputError(f"{path} is damaged or not a file of plain weights (it is empty): download it again")
    if begin.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    if begin.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise InputError(
            f"{path} is a web page, not weights: download the file itself (on the Hub, the address with /resolve/, not "
            f"/blob/)"
        )


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_strictly(module: Module, weights: Mapping[str, Tensor], source: object, copy: bool = True) -> Module:
    """Loads `weights` into `module` on the CPU, with exactly matching keys and shapes, and sets eval mode.

    Build `module` on the meta device, so that memory holds its weights once. Those of a memory-mapped file must be
    copied, because they would change, or crash the process, if the file is written to.

    Raises:
        InputError: naming the first keys that are missing, unexpected, of another shape or of another kind of number,
            or a tensor that is not finite.
    """
    expected = module.state_dict()
    check_state_dict(expected, weights, f"{source} does not fit {type(module).__name__}")
    check_kinds(expected, weights, source)
    copies = {name: weights[name].to("cpu", tensor.dtype, copy=copy).contiguous() for name, tensor in expected.items()}
    check_finite(copies, source)
    module.load_state_dict(copies, assign=True)
    return module.eval()


def check_kinds(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: object) -> None:
    """Raises InputError if a tensor holds another kind of number than expected; names the first one."""
    for name in (name for name in expected if name in weights):
        if weights[name].is_floating_point() != expected[name].is_floating_point() or weights[name].is_complex():
            raise InputError(f"{source} has {name} as {weights[name].dtype}, expected {expected[name].dtype}")


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Raises InputError if a tensor is not finite; names the first one."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise InputError(f"{source} holds NaN or infinite values in {name}: use weights of an earlier checkpoint")


def is_finite(tensor: Tensor) -> bool:
    """Returns whether all values are finite; without a mask of them, and several times as fast as `torch.isfinite`."""
    return not tensor.numel() or all(bound.isfinite() for bound in tensor.aminmax())


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
