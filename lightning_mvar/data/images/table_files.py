"""Parquet and Arrow files by groups of rows; what is read is bounded by what the file can hold."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_mvar.data.images import arrow_bodies, parquet_pages
from lightning_mvar.errors import InputError, one_line, require_package
from lightning_mvar.io.files import open_regular

CACHED_GROUPS = 2  # groups cached per process: a batch reads from one or two
MAX_GROUP_BYTES = 2**31  # of a row group in memory
MAX_ROWS_PER_BYTE = 8  # of a file
MAX_ROW_BYTES = 64  # of a row in memory besides its values: offsets and marks of nulls
ROWS_AT_ONCE = 64
MAX_NAME_BYTES = 4096  # of a name or path
ARROW_FILE = b"ARROW1"  # begins Arrow's file format, which is a stream and its index; the stream format has no mark
STREAM_BEGIN = 8  # in the file format
MAX_GROWTH = 8  # of an Arrow file when decompressed, which it stays
MAX_PAGE_GROWTH = 64  # of a Parquet file when columns of a row group are decompressed
MIN_PAGES = 2**26  # bytes that they may have in any file
MIN_DECOMPRESSED = 2**20  # bytes that any file or row group may have
TABLE_ERRORS = (  # base classes of pyarrow's errors; MemoryError: a buffer of a claimed size, allocated but not filled
    *(OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, MemoryError, OverflowError),
)


class TableFile(ABC):
    """A file of rows in groups; `schema` is pyarrow's."""

    path: Path
    schema: Any
    num_groups: int

    @abstractmethod
    def read(self, group: int, columns: Sequence[str]) -> Any:
        """Returns some columns of a group as a pyarrow table; `column.field` is a field of a struct.

        Raises:
            InputError: if the file is damaged, or the group is too large.
        """

    def has_field(self, column: str, field: str) -> bool:
        """Returns whether a struct column has a field."""
        kind = self.schema.field(column).type
        return field in [kind.field(i).name for i in range(kind.num_fields)]


class ParquetTable(TableFile):
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

        self.path, self.file = path, ParquetFile(path)
        self.schema, self.num_groups = self.file.schema_arrow, self.file.num_row_groups
        rows, size = self.file.metadata.num_rows, path.stat().st_size
        if not 0 <= rows <= MAX_ROWS_PER_BYTE * size:
            raise ValueError(f"it claims {rows} rows in {size} bytes")

    def read(self, group: int, columns: Sequence[str]) -> Any:
        from pyarrow.parquet import ParquetFile

        try:
            metadata = self.file.metadata.row_group(group)  # its columns may abort the process if they are damaged
            rows, size, file_size = metadata.num_rows, metadata.total_byte_size, self.path.stat().st_size
            if 0 <= size <= MAX_GROUP_BYTES and 0 <= rows <= MAX_ROWS_PER_BYTE * file_size:
                max_bytes = min(size + MIN_DECOMPRESSED, max(MAX_PAGE_GROWTH * file_size, MIN_PAGES))
                if parquet_pages.decompressed_bytes(self.path, group, columns) > max_bytes:
                    raise ValueError(
                        f"its rows have more than {max_bytes} bytes, the most that index and file size allow"
                    )
                # Where each row might refer to one long value, values are read as a dictionary and stored once.
                repeated = list(columns) if rows * size > MAX_GROUP_BYTES else None
                if rows and repeated is None:
                    return read_rows(self.file, group, columns, rows * size + rows * MAX_ROW_BYTES + MIN_DECOMPRESSED)
                file = ParquetFile(self.path, read_dictionary=repeated)
                return file.read_row_group(group, columns=list(columns), use_threads=False)
        except TABLE_ERRORS as error:
            raise InputError(f"{self.path} is damaged in row group {group} ({one_line(error)})") from error
        raise InputError(
            f"{self.path} has {rows} rows and {size} bytes in row group {group}, more than {MAX_GROUP_BYTES}: write it "
            f"again with smaller row groups"
        )


def read_rows(file: Any, group: int, columns: Sequence[str], max_bytes: int) -> Any:
    """Reads a row group of a Parquet file in small batches, because the size in its index may be false.

    Raises:
        ValueError: as soon as the rows that have been read have more than `max_bytes` bytes.
    """
    from pyarrow import Table  # type: ignore[import-untyped]

    batches, size = [], 0
    options = {"row_groups": [group], "columns": list(columns), "use_threads": False}
    for batch in file.iter_batches(ROWS_AT_ONCE, **options):
        batches.append(batch)
        size += batch.nbytes
        if size > max_bytes:
            raise ValueError(f"its rows have more than {max_bytes} bytes, the most that its index allows")
    return Table.from_batches(batches)


class ArrowTable(TableFile):
    """An Arrow file, as `save_to_disk` writes it; its groups are its record batches, mapped unless compressed."""

    def __init__(self, path: Path) -> None:
        from pyarrow import ipc, memory_map

        source = memory_map(os.fspath(path))
        is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
        begin, limit = STREAM_BEGIN if is_file else 0, MAX_GROWTH * source.size() + MIN_DECOMPRESSED
        source.seek(begin)
        if (size := arrow_bodies.decompressed_bytes(source)) > limit:
            raise ValueError(f"it claims {size} bytes after decompression, more than {limit}: write it uncompressed")
        source.seek(begin)
        reader = ipc.open_stream(source)
        self.path, self.schema = path, reader.schema
        self.batches = reader.read_all().to_batches()
        self.num_groups = len(self.batches)
        if is_file and self.num_groups != ipc.open_file(source).num_record_batches:
            raise ValueError("its index lists other batches")

    def read(self, group: int, columns: Sequence[str]) -> Any:
        from pyarrow import Table

        names = list(dict.fromkeys(name if name in self.schema.names else name.rpartition(".")[0] for name in columns))
        try:
            batch = self.batches[group].select(names)
            batch.validate(full=True)  # offsets of a damaged file would point outside of it
        except TABLE_ERRORS as error:
            raise InputError(f"{self.path} is damaged in batch {group} ({one_line(error)})") from error
        return Table.from_batches([batch])


def open_table(path: Path) -> TableFile:
    """Opens a Parquet or an Arrow file, as its suffix says.

    Raises:
        InputError: if pyarrow is not installed, or the file is damaged.
    """
    require_package("pyarrow", "parquet", f"reading {path}")
    open_regular(path).close()
    try:
        return ParquetTable(path) if path.suffix == ".parquet" else cached_arrow(path)
    except TABLE_ERRORS as error:
        kind = "a Parquet" if path.suffix == ".parquet" else "an Arrow"
        raise InputError(f"{path} is damaged or not {kind} file ({one_line(error)})") from error


def read_group(path: Path, group: int, columns: tuple[str, ...]) -> Any:
    return open_table(path).read(group, columns)


# Groups are read without threads, because a process forked afterwards would not inherit them.
cached_group = lru_cache(maxsize=CACHED_GROUPS)(read_group)
cached_arrow = lru_cache(maxsize=None)(ArrowTable)  # mapped; compressed ones take `MAX_GROWTH` times their size at most


def texts_of(column: Any, path: Path) -> list[Any]:
    """Returns the values of a column of numbers or texts, which may be null.

    Raises:
        InputError: if a text has more than `MAX_NAME_BYTES`, or is not UTF-8.
    """
    try:
        return [value for chunk in column.chunks for value in chunk_values(chunk)]
    except TABLE_ERRORS as error:
        raise InputError(f"{path} has a damaged column ({one_line(error)})") from error


def chunk_values(chunk: Any) -> list[Any]:
    from pyarrow import compute, types

    choices = chunk.dictionary if types.is_dictionary(chunk.type) else chunk
    if not types.is_integer(choices.type):
        longest = compute.max(compute.binary_length(choices)).as_py()
        if longest is not None and longest > MAX_NAME_BYTES:
            raise ValueError(f"a name or path of {longest} bytes, more than {MAX_NAME_BYTES}")
    values = choices.to_pylist()
    if choices is chunk:
        return list(values)
    return [None if i is None else values[i] for i in chunk.indices.to_pylist()]  # repeated texts are shared
