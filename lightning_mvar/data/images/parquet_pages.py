"""Reads the claimed sizes of the pages in a Parquet row group before anything is decompressed.

A reader decompresses each page into a buffer whose size is in the page's own header and may differ from the file's
index. Index and headers are structs in Thrift's compact encoding, whose fields are numbered as in `parquet.thrift`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lightning_mvar.io.files import open_regular

MAGIC = b"PAR1"
ROW_GROUPS, COLUMNS, METADATA = 4, 1, 3  # of FileMetaData, RowGroup and ColumnChunk
NAME, COMPRESSED, DATA_PAGES, DICTIONARY_PAGE = 3, 7, 9, 11  # of ColumnMetaData: bytes with headers, and two offsets
PAGE_UNCOMPRESSED, PAGE_COMPRESSED = 2, 3  # of PageHeader, in bytes
HEADER_BYTES = 2**16  # of a page header: its statistics hold two values
MAX_PAGES = 2**16  # of a column in a row group; reading their headers takes seconds
MAX_DEPTH = 32  # of structs and lists inside each other
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12  # types of values
INTEGERS = (4, 5, 6)

Struct = dict[int, Any]  # values by field number


def decompressed_bytes(path: Path, group: int, columns: Sequence[str]) -> int:
    """Returns the total size in bytes that the pages of some columns of a row group claim.

    Args:
        path: the file.
        group: index of the row group.
        columns: names of columns; `column.field` is a field of a struct.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, InputError: if the file is damaged.
    """
    with open_regular(path) as file:
        chunks = [chunk[METADATA] for chunk in read_index(file)[ROW_GROUPS][group][COLUMNS]]
        names = [b".".join(chunk[NAME]).decode() for chunk in chunks]
        prefixes = tuple(f"{column}." for column in columns)
        chosen = [chunk for name, chunk in zip(names, chunks, strict=True) if f"{name}.".startswith(prefixes)]
        return sum(sum(page_sizes(file, chunk)) for chunk in chosen)


def read_index(file: BinaryIO) -> Struct:
    """Reads FileMetaData, which is followed by its length and 4 magic bytes at the end of the file."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != MAGIC or length > size - 8:
        raise ValueError("it has no index")
    file.seek(size - 8 - length)
    return Thrift(file, length).struct()


def page_sizes(file: BinaryIO, chunk: Struct) -> Iterator[int]:
    """Yields the decompressed size that each page of a column chunk (given by its ColumnMetaData) claims."""
    position = min(chunk[DATA_PAGES], chunk.get(DICTIONARY_PAGE) or chunk[DATA_PAGES])
    end = position + chunk[COMPRESSED]
    if not 0 <= position <= end <= file.seek(0, 2):
        raise ValueError("its index places pages outside the file")
    pages = 0
    while position < end:
        if (pages := pages + 1) > MAX_PAGES:
            raise ValueError(f"it has more than {MAX_PAGES} pages: write it again with larger pages")
        file.seek(position)
        header = Thrift(file, HEADER_BYTES)
        page = header.struct()
        if page[PAGE_UNCOMPRESSED] < 0 or page[PAGE_COMPRESSED] < 0:
            raise ValueError("it has a page with a negative size")
        yield page[PAGE_UNCOMPRESSED]
        position += header.position + page[PAGE_COMPRESSED]


class Thrift:
    """Reads values in Thrift's compact encoding from a file.

    Args:
        file: an open file, at the first value.
        size: maximum number of bytes to read; a value that extends beyond them or the file raises ValueError.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.position, self.depth = file, size, 0, 0

    def take(self, count: int) -> bytes:
        taken = self.file.read(min(count, self.size - self.position))
        if len(taken) < count:
            raise ValueError("a struct in its metadata is truncated")
        self.position += count
        return taken

    def varint(self) -> int:
        number, shift = 0, 0
        while shift < 64:
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7
        raise ValueError("a number in its metadata has more than 64 bits")

    def integer(self) -> int:
        number = self.varint()
        return (number >> 1) ^ -(number & 1)

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while kind := self.take(1)[0]:
            delta, kind = kind >> 4, kind & 0x0F
            number = number + delta if delta else self.integer()
            fields[number] = kind == TRUE if kind in (TRUE, FALSE) else self.value(kind)
        return fields

    def nested(self, read: Callable[[], Any]) -> Any:
        """Calls `read` for a nested value, up to MAX_DEPTH levels."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("its metadata is nested too deeply")
        value = read()
        self.depth -= 1
        return value

    def items(self) -> list[Any]:
        head = self.take(1)[0]
        count = self.varint() if head >> 4 == 15 else head >> 4
        return [self.value(head & 0x0F) for _ in range(count)]

    def value(self, kind: int) -> Any:
        if kind in INTEGERS:
            return self.integer()
        if kind in (TRUE, FALSE, BYTE):  # in lists, a Boolean takes a byte
            return self.take(1)[0]
        if kind == DOUBLE:
            return self.take(8)
        if kind == BINARY:
            return self.take(self.varint())
        if kind in (LIST, SET):
            return self.nested(self.items)
        if kind == STRUCT:
            return self.nested(self.struct)
        raise ValueError(f"its metadata holds a value of the unknown type {kind}")
