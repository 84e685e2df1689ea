"""Writes sharded checkpoints and hashes their files during the write, so that nothing is read back."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystem

from lightning_mvar.checkpoints.training import PLAIN_PART, Checksums


class HashedStream:
    """Wraps a file opened for writing; counts and hashes the bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.size, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        self.size, self.crc = self.size + memoryview(data).nbytes, zlib.crc32(data, self.crc)
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class HashingFileSystem(FileSystem):
    """Local file system; `checksums` holds the size and CRC-32 of the files written."""

    def __init__(self) -> None:
        self.checksums: Checksums = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            hashed = HashedStream(file)
            yield hashed
        self.checksums[Path(path).name] = (hashed.size, hashed.crc)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


def save_sharded(
    checkpoint: dict[str, Any], folder: Path, is_global_zero: bool, group: ProcessGroup | None = None
) -> Checksums:
    """Writes this rank's shard of a checkpoint, and on rank 0 everything but tensors; all ranks must call this.

    The layout is Lightning's. Returns the checksums of the files that this rank has written.

    Args:
        checkpoint: content of the checkpoint; weights and moments are removed from it.
        folder: the checkpoint.
        is_global_zero: whether this is rank 0.
        group: process group of all ranks that is not in use by another thread; the default group if None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"state_dict": checkpoint.pop("state_dict")}
    tensors |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
    writer = dcp.FileSystemWriter(folder)
    writer.fs = files = HashingFileSystem()
    dcp.save(tensors, storage_writer=cast(dcp.StorageWriter, writer), process_group=group)
    if is_global_zero:
        with files.create_stream(folder / PLAIN_PART, "wb") as stream:
            torch.save(checkpoint, stream)
    return files.checksums
