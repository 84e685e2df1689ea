"""Sharded checkpoints (`torch.distributed.checkpoint`, DCP), read without running code from their files.

A sharded checkpoint is a folder with one file of tensors per rank and `.metadata`, a pickle that says where each tensor
is stored. DCP unpickles it and all entries that are not tensors without restrictions, so the author of a folder could
run any code. Here the pickle may only name the classes that metadata needs, and entries hold plain data.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import open_regular, read_regular
from lightning_mvar.io.tensors import DAMAGE, StateDict, first_line, read_plain

METADATA = ".metadata"
MAX_METADATA_BYTES = 2**28  # a large network on 1,000 ranks has about 100 MB
CLASSES = {  # classes that `.metadata` may name, by module
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath"},
}


class MetadataUnpickler(pickle._Unpickler):
    """Unpickler of `.metadata`, in Python because the C version allocates whatever size the file claims."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # as written by Python 3.13
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("it changes a class")
        super().load_build()  # type: ignore[misc]

    def load_bytearray8(self) -> None:
        raise pickle.UnpicklingError("it holds a bytearray, which would be allocated before it is read")

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


class PlainLoadPlanner(dcp.DefaultLoadPlanner):
    """DCP's planner, but entries other than tensors must be plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(read_plain(value, read_item.storage_index.fqn), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)  # unpickles only what was written two lines above


class ShardReader(dcp.FileSystemReader):
    """DCP's folder reader, but it trusts neither metadata nor shards.

    Raises:
        InputError: if the metadata is missing or damaged, or does not match the files of the folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.metadata = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            with open_regular(self.folder / info.relative_path) as file:
                file.seek(info.offset)
                stream = io.BytesIO(file.read(info.length))
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, stream)
            else:
                source = part_of(read_plain(stream, f"{self.folder / info.relative_path}"), item)
                target = planner.resolve_tensor(item).detach()
                if source.shape != target.shape:
                    raise InputError(f"{self.folder} is damaged: {item.storage_index.fqn} has another shape")
                target.copy_(source)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def load(self, state: dict[str, Any], no_dist: bool = False) -> None:
        """Loads the entries of `state` in place; all ranks must call this unless `no_dist` is set.

        Raises:
            InputError: if an entry is missing or damaged.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected with no_dist
                dcp.load(state, storage_reader=self, planner=PlainLoadPlanner(), no_dist=no_dist)
        except dcp.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, InputError):
                raise cause from None
            raise InputError(f"{self.folder} does not fit, or is damaged ({first_line(cause)})") from error


def part_of(value: Any, item: ReadItem) -> Tensor:
    """Returns the requested part of a stored tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{item.storage_index.fqn} is not a tensor")
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        value = value.narrow(dim, offset, length)
    return value


def read_metadata(folder: Path) -> Metadata:
    """Reads the description of a sharded checkpoint and checks it against the files of the folder.

    Raises:
        InputError: if it is missing or damaged, names classes other than DCP's, or data that the files do not hold.
    """
    path = folder / METADATA
    data = read_regular(path, MAX_METADATA_BYTES)
    try:
        metadata = MetadataUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, *DAMAGE) as error:
        raise InputError(f"{path} is damaged or not of a sharded checkpoint ({first_line(error)})") from error
    if problem := find_problem(metadata, {file.name: file.stat().st_size for file in folder.iterdir()}):
        raise InputError(f"{path} is damaged or not of a sharded checkpoint ({problem})")
    checked: Metadata = metadata
    return checked


def find_problem(metadata: Any, sizes: dict[str, int]) -> str | None:
    """Returns why files of these sizes cannot hold what the metadata describes; None if they can.

    Unpickling ensures no types, so each field is checked.
    """
    if not fits(metadata, Metadata, state_dict_metadata=dict, storage_data=dict):
        return "it is not metadata"
    needed = 0
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            return "it has an entry without a name"
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not fits(entry, TensorStorageMetadata, size=torch.Size, properties=TensorProperties):
            return f"it describes {name} by a {type(entry).__name__}, not by a tensor's size and properties"
        if min(entry.size, default=0) < 0 or not fits(entry.properties, TensorProperties, dtype=torch.dtype):
            return f"it has a negative size or no dtype for {name}"
        needed += math.prod(entry.size) * entry.properties.dtype.itemsize
    if needed > sum(sizes.values()):
        return f"it claims {needed} bytes of tensors, more than the files hold"
    for index, info in metadata.storage_data.items():
        known = fits(index, MetadataIndex, fqn=str) and fits(
            info, _StorageInfo, relative_path=str, offset=int, length=int
        )
        if not known or getattr(info, "transform_descriptors", None):
            return "it describes data of an unknown form"
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes.get(info.relative_path, -1):
            return f"it places {index.fqn} outside the files of the folder"
    return None


def fits(value: Any, kind: type, **fields: type) -> bool:
    """Returns whether an unpickled object is an instance of a class and has fields of these types."""
    return isinstance(value, kind) and all(isinstance(getattr(value, name, None), fields[name]) for name in fields)


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a sharded checkpoint whose names start with `prefix`, named without it.

    Each access reads one tensor and joins the shards of all ranks on the CPU of this process; see also `read_all`.

    Raises:
        InputError: if the checkpoint cannot be read.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.reader, self.prefix = ShardReader(folder), prefix
        self.entries = {
            name.removeprefix(prefix): entry
            for name, entry in self.reader.metadata.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]

    def read(self, names: Iterable[str]) -> StateDict:
        """Reads several tensors at once, which is faster than one after the other."""
        entries = {name: self.entries[name] for name in names}
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        self.reader.load({self.prefix + name: tensor for name, tensor in tensors.items()}, no_dist=True)
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_all(tensors: Mapping[str, Tensor]) -> StateDict:
    """Reads all tensors of a mapping that reads on use."""
    return tensors.read(tensors) if isinstance(tensors, ShardedTensors) else dict(tensors)
