"""Reads arrays in npy and npz files without executing code, and writes npz files row by row.

Headers are untrusted: the size that a header claims is compared with the size of the file before memory is allocated.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, open_regular

MAX_HEADER_BYTES = 2**14
MAX_TEXT_BYTES = 2**20
MAX_INFLATION = 1032  # of deflate: compressed content grows by at most this factor
KINDS = "biufcSU"  # numpy's codes of the plain types: numbers and strings
# Raised by numpy for a forged header (MemoryError: nested too deeply for Python's parser), and by zipfile.
HEADER_ERRORS = (ValueError, EOFError, SyntaxError, TokenError, TypeError, OverflowError, MemoryError, RecursionError)
NPZ_ERRORS = (OSError, ValueError, KeyError, EOFError, RuntimeError, OverflowError, struct.error, BadZipFile, ZlibError)


class Header(NamedTuple):
    """The header of an npy file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    end: int  # offset of the first element, in bytes

    @property
    def num_bytes(self) -> int:
        """Size of the array that the header claims."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes], size: int) -> Header:
    """Reads the header at the start of an npy file.

    Args:
        stream: the file, at its start.
        size: size of the file in bytes.

    Raises:
        ValueError: if the header is damaged, does not match the size of the file, or describes an array of anything but
            numbers and strings.
    """
    head = BytesIO(stream.read(MAX_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        header = Header(*read(head), head.tell())
    except HEADER_ERRORS as error:
        raise ValueError("the header of the array is damaged") from error
    if header.dtype.kind not in KINDS:
        raise ValueError(f"the array must hold numbers or strings, not {header.dtype.type.__name__}")
    if min(header.shape, default=0) < 0 or header.end + header.num_bytes != size:
        raise ValueError(f"the header of the array claims the shape {header.shape!s:.80} in a file of {size} bytes")
    return header


def read_npy(data: bytes | memoryview) -> NDArray[Any]:
    """Decodes an npy file; the array is read-only.

    Raises:
        ValueError: if it is damaged, or holds anything but numbers and strings.
    """
    header = read_header(BytesIO(data[:MAX_HEADER_BYTES]), len(data))
    return decode(data[header.end :], header)


def decode(content: bytes | memoryview, header: Header) -> NDArray[Any]:
    return np.frombuffer(content, header.dtype).reshape(header.shape, order="F" if header.fortran_order else "C")


def array_names(path: Path) -> list[str]:
    """Returns the names of the arrays in an npz file; raises InputError if it is missing or damaged."""
    with open_npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_text(path: Path, name: str) -> str:
    """Reads a string that is stored as an array; raises InputError if it is missing, damaged, or larger than 1 MB."""
    array = NpzArray(path, name)
    if array.dtype.kind != "U" or array.shape or array.dtype.itemsize > MAX_TEXT_BYTES:
        raise InputError(f"{path}: {name} must be a short string, got {array.dtype} {array.shape}")
    return str(array.read())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises InputError if the file cannot be read as an npz of arrays."""
    try:
        yield
    except InputError:
        raise
    except NPZ_ERRORS as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise InputError(f"{path} is damaged or not an npz of arrays ({reason})") from error


@contextmanager
def open_npz(path: Path) -> Iterator[ZipFile]:
    with reading(path), open_regular(path) as file, ZipFile(file) as archive:
        yield archive


class NpzArray:
    """An array in an npz file, read completely or row by row; reading rows in ascending order is fastest.

    Shape and dtype are known before any data is read, so they can be checked first.

    Args:
        path: the file.
        name: name of the array.

    Raises:
        InputError: if the file is missing or damaged, or has no such array or one whose size does not match its header.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.member = path, name, f"{name}.npy"
        if name not in (available := array_names(path)):
            raise InputError(f"{path} has no array {name}; it holds {', '.join(available) or 'none'}")
        with open_npz(path) as archive:
            info = archive.getinfo(self.member)
            require_plausible_size(info, path.stat().st_size)
            with archive.open(info) as stream:
                self.header = read_header(stream, info.file_size)
        self.shape, self.dtype = self.header.shape, self.header.dtype
        self.stream: IO[bytes] | None = None
        self.owner_pid = 0  # process id: forked loader workers must not share a file position

    def read(self) -> NDArray[Any]:
        """Returns the complete array in C order and native byte order."""
        with open_npz(self.path) as archive, archive.open(self.member) as stream:
            stream.seek(self.header.end)
            array = decode(stream.read(self.header.num_bytes), self.header)
            return array.astype(self.dtype.newbyteorder("="), order="C")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Returns a row; the array must be in C order."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        size = self.header.num_bytes // len(self)
        with reading(self.path):
            if self.stream is None or self.owner_pid != os.getpid():
                self.owner_pid = os.getpid()
                archive = ZipFile(open_regular(self.path))
                self.stream = archive.open(self.member)
            self.stream.seek(self.header.end + index * size)
            return np.frombuffer(bytearray(self.stream.read(size)), self.dtype).reshape(self.shape[1:])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stream": None}


def require_plausible_size(member: ZipInfo, archive_bytes: int) -> None:
    """Raises ValueError if a member of a zip archive claims to be larger than its compressed content can be."""
    if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError(f"{member.filename} must be stored or deflated, as numpy writes it")
    inflation = 1 if member.compress_type == ZIP_STORED else MAX_INFLATION
    if member.file_size > inflation * min(member.compress_size, archive_bytes):
        raise ValueError(f"{member.filename} cannot hold {member.file_size} bytes")


def write_npz(
    path: Path, name: str, rows: Iterable[NDArray[Any]], shape: tuple[int, ...], extras: Mapping[str, NDArray[Any]]
) -> None:
    """Writes an array of `shape` row by row, so that memory holds one row, and the small arrays `extras`.

    Each row is uint8 of `shape[1:]`. The bytes of the file depend only on the content.
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
