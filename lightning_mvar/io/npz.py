"""Arrays in npz files, read without executing code, whole or row by row, and written row by row."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile, ZipInfo
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path

NPZ_ERRORS = (OSError, ValueError, KeyError, EOFError, AttributeError, BadZipFile, ZlibError)


def read_npz(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    """Reads the named arrays of a file.

    Raises:
        InputError: if the file is missing or damaged, or lacks an array.
    """
    require_array(path, *names)
    with reading(path), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


def require_array(path: Path, *names: str) -> None:
    """Raises InputError if an array is not in the file."""
    available = array_names(path)
    if missing := [name for name in names if name not in available]:
        raise InputError(f"{path} has no array {missing[0]}; it holds {', '.join(available) or 'none'}")


def array_names(path: Path) -> list[str]:
    with reading(path), np.load(path, allow_pickle=False) as file:
        return list(file.files)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises InputError if the file is missing or cannot be read as an npz of arrays."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        yield
    except NPZ_ERRORS as error:
        raise InputError(f"{path} is damaged or not an npz of arrays ({type(error).__name__})") from error


class NpzRows:
    """Rows of one array in an npz file, read on access; fastest in ascending order.

    Args:
        path: the file.
        name: name of the array.

    Raises:
        InputError: if the file is missing or damaged, or has no such array.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.member = path, f"{name}.npy"
        require_array(path, name)
        with reading(path), ZipFile(path) as archive, archive.open(self.member) as stream:
            self.shape, fortran_order, self.dtype = read_header(stream)
            self.begin = stream.tell()
        if fortran_order or self.dtype.hasobject:
            raise InputError(f"{path}: {name} must be an array in C order, without Python objects")
        self.stream: IO[bytes] | None = None
        self.owner_pid = 0  # process id: forked loader workers must not share a file position

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with reading(self.path):
            if self.stream is None or self.owner_pid != os.getpid():
                self.owner_pid = os.getpid()
                self.stream = ZipFile(self.path).open(self.member)  # noqa: SIM115 (stays open as long as this object)
            self.stream.seek(self.begin + index * size)
            content = self.stream.read(size)
            return np.frombuffer(bytearray(content), self.dtype).reshape(self.shape[1:])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stream": None}


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Returns the shape, whether the order is Fortran's, and the dtype of the array in a stream."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def write_npz(
    path: Path, name: str, rows: Iterable[NDArray[Any]], shape: tuple[int, ...], extras: Mapping[str, NDArray[Any]]
) -> None:
    """Writes an array of `shape` row by row, without holding it in memory, and the small arrays `extras`.

    Each row is uint8 of `shape[1:]`. The bytes of the file depend on the content alone.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_path(path) as temporary, ZipFile(temporary, "w") as archive:
        with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for row in rows:
                stream.write(row.tobytes())
        for extra, array in extras.items():
            with archive.open(ZipInfo(f"{extra}.npy"), "w") as stream:
                np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)
