"""Packs of a token shard, read from its tar file and checked: shards are untrusted.

Headers are read one by one with the checksum of each, instead of with `tarfile`, which takes a damaged header for the
end of the file, follows links, and loops for ever on some forged sizes.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.io.files import open_regular
from lightning_mvar.io.npz import read_npy

PACK_SIZE = 512  # images per pack, unless others wrote it: 0.7 MB at 680 tokens
MEMBERS = ("tokens.npy", "labels.npy", "keys.json")  # of each pack
MEMBER_DTYPES = {"tokens.npy": np.dtype(np.uint16), "labels.npy": np.dtype(np.int64)}
MAX_MEMBER_BYTES = 2**26  # 512 images of 1024 pixels have 10 MB of tokens
MAX_KEY_BYTES = 2**13  # per image
# Raised for a damaged file, or one that is not a token shard.
PACK_ERRORS = (OSError, ValueError)


class Pack(NamedTuple):
    """Consecutive images of a shard."""

    tokens: NDArray[np.uint16]  # (n, l)
    labels: NDArray[np.int64]  # (n,)
    keys: list[str]


@dataclass(frozen=True)
class TokenSpec:
    """Properties that the manifest prescribes for the tokens and labels of every shard; None if unknown."""

    num_tokens: int | None = None
    vocab_size: int | None = None
    num_classes: int | None = None


class Member(NamedTuple):
    """A regular file inside a tar file."""

    name: str
    begin: int  # offset of its content, in bytes
    size: int


def read_packs(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields each pack's name and the content of its members by extension.

    Raises:
        OSError, ValueError: see `find_packs`.
    """
    with open_regular(path) as file:
        for name, members in find_packs(file):
            content = {}
            for extension, member in members.items():
                file.seek(member.begin)
                content[extension] = file.read(member.size)
            yield name, content


def find_packs(file: BinaryIO) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yields each pack's name and its members by extension, split at the first dot of the file's name as in WebDataset.

    Raises:
        OSError, ValueError: if the file is not a complete tar file of small regular files, or a pack has
            two members of one name.
    """
    for name, members in groupby(find_members(file), key=lambda member: split_name(member.name)[0]):
        pack: dict[str, Member] = {}
        for member in members:
            if (extension := split_name(member.name)[1]) in pack:
                raise ValueError(f"it has {member.name} twice")
            pack[extension] = member
        yield name, pack


def find_members(file: BinaryIO) -> Iterator[Member]:
    """Yields the members of a tar file from its headers, up to its end or to a block of zeros."""
    end, position = file.seek(0, os.SEEK_END), 0
    while file.seek(position) < end and (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"there is no header of an uncompressed tar file at byte {position}: {error}") from error
        begin = position + tarfile.BLOCKSIZE
        if not member.name.isprintable():
            raise ValueError("it has a member whose name is not printable")
        if not 0 <= member.size <= MAX_MEMBER_BYTES:
            raise ValueError(f"{member.name} cannot have {member.size} bytes")
        if begin + member.size > end:
            raise ValueError(f"it is truncated in the middle of {member.name}")
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield Member(member.name, begin, member.size)
        elif member.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE):  # extended times and owners
            raise ValueError(f"{member.name} is not a regular file")
        position = begin + member.size + -member.size % tarfile.BLOCKSIZE


def split_name(path: str) -> tuple[str, str]:
    """Splits a member's path at the first dot of its file name."""
    folder, slash, name = path.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension


class CheckedPack:
    """Decodes the members of a pack, arrays without pickle, and collects a message for each problem.

    Args:
        name: name of the pack, for messages.
        members: content of each member by extension.
        spec: properties that the manifest prescribes for every shard.
        headers_only: whether to leave the values of arrays and the keys unread.
    """

    def __init__(
        self, name: str, members: Mapping[str, bytes | memoryview], spec: TokenSpec, headers_only: bool = False
    ) -> None:
        self.name = name
        self.messages = [f"pack {name} has no {member}" for member in MEMBERS if member not in members]
        if unknown := [member for member in members if member not in MEMBERS]:
            self.messages.append(f"pack {name} has {', '.join(unknown)}, which does not belong in a token shard")
        self.tokens, self.labels = (self.parse_array(member, members.get(member)) for member in MEMBER_DTYPES)
        arrays = zip(MEMBER_DTYPES, (self.tokens, self.labels), strict=True)
        counts = {member: len(values) for member, values in arrays if values is not None}
        self.keys: list[str] | None = None
        if not headers_only:
            self.keys = self.parse_keys(members.get("keys.json"), max(counts.values(), default=0))
        if self.keys is not None:
            counts["keys.json"] = len(self.keys)
        self.samples = min(counts.values(), default=0)
        if len(set(counts.values())) > 1:
            self.messages.append(
                f"pack {name} has unequal counts: {', '.join(f'{n} in {member}' for member, n in counts.items())}"
            )
        elif not self.samples:
            self.messages.append(f"pack {name} has no samples")
        if self.tokens is not None and spec.num_tokens not in (None, length := self.tokens.shape[1]):
            self.messages.append(
                f"pack {name} has {length} tokens per sample, the manifest's schedule {spec.num_tokens}"
            )
        if not headers_only:
            self.check_values(spec)

    def pack(self) -> Pack:
        """Returns the pack, unless only headers were read.

        Raises:
            ValueError: with the message of the first problem.
        """
        tokens, labels = self.arrays()
        assert self.keys is not None
        return Pack(tokens, labels, self.keys)

    def arrays(self) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Returns tokens (n, l) and labels (n,), views of the given content; raises ValueError as `pack` does."""
        if self.messages or self.tokens is None or self.labels is None:
            raise ValueError(self.messages[0])
        return self.tokens, self.labels

    def parse_array(self, member: str, data: bytes | memoryview | None) -> NDArray[Any] | None:
        """Returns a member as an array, None if its values cannot be checked; records a message if it is malformed."""
        if data is None:
            return None
        try:
            values = read_npy(data)
        except ValueError as error:
            self.messages.append(f"{self.name}.{member} is not a numpy array ({error})")
            return None
        dtype, ndim = MEMBER_DTYPES[member], 2 if member == "tokens.npy" else 1
        if values.dtype != dtype or values.ndim != ndim:
            shape = f"{values.dtype} of shape {values.shape!s:.80}"
            self.messages.append(f"{self.name}.{member} is {shape}, not {dtype} of {ndim} dimension{'s' * (ndim > 1)}")
            return values if values.ndim == ndim and values.dtype.kind in "iu" else None
        if not values.flags.c_contiguous:
            self.messages.append(f"{self.name}.{member} is stored column by column; save np.ascontiguousarray of it")
        return values

    def parse_keys(self, data: bytes | memoryview | None, count: int) -> list[str] | None:
        """Returns the keys of `count` images; records a message and returns None if they are not a list of strings."""
        if data is None:
            return None
        if len(data) > MAX_KEY_BYTES * count + 2:
            self.messages.append(f"{self.name}.keys.json has {len(data)} bytes, too many for {count} images")
            return None
        try:
            values = json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            self.messages.append(f"{self.name}.keys.json is not JSON ({error})")
            return None
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            self.messages.append(f"{self.name}.keys.json is not a list of strings")
            return None
        return values

    def check_values(self, spec: TokenSpec) -> None:
        """Records a message for each array with values out of range."""
        for name, values, end in (
            ("tokens", self.tokens, spec.vocab_size),
            ("labels", self.labels, spec.num_classes),
        ):
            if values is not None and (problem := range_problem(name, values, end)):
                self.messages.append(f"pack {self.name} {problem}")


def range_problem(name: str, values: NDArray[Any], end: int | None) -> str | None:
    """Returns a message if some values are not in [0, end); None if all are, or `end` is None."""
    if end is None or not values.size or (values.min() >= 0 and values.max() < end):
        return None
    wrong = np.argwhere((values < 0) | (values >= end))
    row, value = wrong[0][0], values[tuple(wrong[0])]
    return f"has {len(wrong)} {name} outside [0, {end}), the first is {value} in sample {row}"
