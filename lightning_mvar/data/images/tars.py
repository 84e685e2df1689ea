"""Lists the members of tar archives and their byte offsets without unpacking."""

from __future__ import annotations

import os
import os.path
import posixpath
import re
import tarfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from lightning_mvar.data.images.names import Skipped
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import open_regular

MAX_HEADER_BYTES = 2**16  # of a member's extended header; a damaged one may claim any size
DIGITS = re.compile(rb"[0-9]{300}")  # longer than any file name; tarfile would take minutes to parse them
MAX_PADDING_BYTES = 2**20  # zeros between two joined archives
MAX_LINKS = 40  # length of a chain of links


class Member(NamedTuple):
    """A file in an archive."""

    archive: int  # index of the outermost archive
    path: str  # within the archive that contains it
    offset: int  # in bytes, within the outermost archive
    size: int
    inner: str = ""  # path of the inner archive that contains it, if any
    target: str = ""  # path to which a link points

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def sample_id(self) -> tuple[int, str]:
        """Identity of the WebDataset sample: the files of a sample have the same name up to the first dot."""
        folder, name = os.path.split(self.path)
        return self.archive, f"{folder}/{name.split('.')[0]}"

    @property
    def column(self) -> str:
        """WebDataset's name for a file within its sample: the part of the name after the first dot."""
        return self.name.partition(".")[2].lower()


class HeaderReader:
    """Wraps a file from which `tarfile` reads headers, and limits their claimed size."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"it is damaged at byte {self.tell()}: a header claims {size} bytes")
        data = self.file.read(size)
        if size > tarfile.BLOCKSIZE and DIGITS.search(data):
            raise tarfile.ReadError(f"it is damaged at byte {self.tell()}: a header is full of digits")
        return data


def list_members(paths: Sequence[Path], skipped: Skipped) -> Iterator[Member]:
    """Lists all files in the archives; a link to a file counts as a file with its own name.

    Args:
        paths: the archives.
        skipped: counts devices and dangling links.

    Raises:
        InputError: if an archive cannot be read.
    """
    for number, path in enumerate(paths):
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if not size:
                    raise tarfile.ReadError("it is empty")
                walk = walk_archive(file, 0, size, number, "")
                members = [*tqdm(walk, desc=f"list {path.name}", unit="file", leave=False)]
        except (OSError, EOFError, tarfile.TarError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{path} is not a tar archive, is compressed or is damaged ({error}): decompress it or download it "
                f"again"
            ) from error
        yield from follow_links(members, path, skipped)


def follow_links(members: list[Member], path: Path, skipped: Skipped) -> Iterator[Member]:
    """Gives links the position and size of the files to which they point; drops dangling links."""
    if not any(member.target for member in members):
        yield from members
        return
    by_path = {(member.inner, member.path): member for member in members}
    for member in members:
        found: Member | None = member
        for _ in range(MAX_LINKS):
            if found is None or not found.target:
                break
            found = by_path.get((member.inner, found.target))
        if found is None or found.target:
            skipped.add("devices, or links to no file of the archive", f"{path}: {member.path}")
        else:
            yield member._replace(offset=found.offset, size=found.size, target="")


def walk_archive(file: BinaryIO, begin: int, end: int, number: int, inner: str) -> Iterator[Member]:
    """Lists the files of the archive at bytes `begin` to `end` of a file, including those in inner archives."""
    while begin < end:  # another archive may follow, as in the output of `cat a.tar b.tar`
        begin = yield from walk_members(file, begin, end, number, inner)


def walk_members(file: BinaryIO, begin: int, end: int, number: int, inner: str) -> Generator[Member, None, int]:
    """Lists the files of one of several joined archives; returns the offset of the next one, or `end`."""
    file.seek(begin)
    with tarfile.open(fileobj=HeaderReader(file), mode="r:") as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            data = member.offset_data
            if member.isfile() and member.issparse():
                raise tarfile.ReadError(f"{member.name} is stored as a sparse file: pack it without --sparse")
            if not 0 <= member.size <= end - data and not (member.islnk() or member.issym()):
                raise tarfile.ReadError(f"it is truncated in the middle of {member.name}")
            path = posixpath.normpath(member.name.lstrip("/"))
            if member.isfile() and member.name.endswith(".tar") and not inner:
                yield from walk_archive(file, data, data + member.size, number, path)
            elif member.isfile():
                yield Member(number, path, data, member.size, inner)
            elif member.islnk():
                yield Member(number, path, 0, 0, inner, posixpath.normpath(member.linkname.lstrip("/")))
            elif member.issym():
                target = posixpath.join(posixpath.dirname(path), member.linkname)
                yield Member(number, path, 0, 0, inner, posixpath.normpath(target))
            elif not member.isdir():
                yield Member(number, path, 0, 0, inner, path)  # a device, treated as a dangling link
            archive.members.clear()  # tarfile would keep all members in memory
        return end_of_padding(file, archive.offset, end)


def end_of_padding(file: BinaryIO, begin: int, end: int) -> int:
    """Returns the end of the zeros after an archive: `end`, or the offset of the next joined archive.

    Raises:
        tarfile.ReadError: if there are none: the archive is truncated, or tarfile took a damaged header for its end.
    """
    file.seek(begin)
    position = begin
    while position < min(end, begin + MAX_PADDING_BYTES):
        block = file.read(min(tarfile.BLOCKSIZE, end - position))
        if any(block):
            if position == begin:
                raise tarfile.ReadError(f"it is damaged at byte {begin}")
            return position
        position += len(block)
    if position == begin:
        raise tarfile.ReadError("it has no end: it was truncated, or is still being written")
    return end
