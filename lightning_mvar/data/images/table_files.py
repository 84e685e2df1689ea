"""Reads Parquet and Arrow files by groups of rows, with memory limits derived from the size of the file."""

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
MAX_GROUP_BYTES = 2**31  # size of a row group in memory
MAX_ROWS_PER_BYTE = 8  # rows per byte of a file
MAX_ROW_BYTES = 64  # memory of a row in addition to its values: offsets and null masks
ROWS_AT_ONCE = 64
MAX_NAME_BYTES = 4096  # size of a name or path
ARROW_FILE = b"ARROW1"  # magic bytes of Arrow's file format, a stream with an index; the stream format has none
STREAM_BEGIN = 8  # offset of the stream in the file format
MAX_GROWTH = 8  # ratio of an Arrow file's decompressed size, which stays in memory, to its size
MAX_PAGE_GROWTH = 64  # ratio of a Parquet row group's decompressed columns to the size of the file
MIN_PAGES = 2**26  # decompressed bytes that columns of a row group may have whatever the size of the file
MIN_DECOMPRESSED = 2**20  # decompressed bytes that any file or row group may have
TABLE_ERRORS = (  # base classes of pyarrow's errors; MemoryError: a buffer of the claimed size was allocated
    *(OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, MemoryError, OverflowError),
)


class TableFile(ABC):
    """A file of rows in groups; `schema` is a pyarrow schema."""

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
            metadata = self.file.metadata.row_group(group)  # reading damaged columns may abort the process
            rows, size, file_size = metadata.num_rows, metadata.total_byte_size, self.path.stat().st_size
            if 0 <= size <= MAX_GROUP_BYTES and 0 <= rows <= MAX_ROWS_PER_BYTE * file_size:
                max_bytes = min(size + MIN_DECOMPRESSED, max(MAX_PAGE_GROWTH * file_size, MIN_PAGES))
                if parquet_pages.decompressed_bytes(self.path, group, columns) > max_bytes:
                    raise ValueError(
                        f"its rows have more than {max_bytes} bytes, the limit given by index and file size"
                    )
                # If each row might refer to the same long value, values are read as a dictionary and stored once.
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
        ValueError: as soon as the rows read so far exceed `max_bytes`.
    """
    from pyarrow import Table  # type: ignore[import-untyped]

    batches, size = [], 0
    options = {"row_groups": [group], "columns": list(columns), "use_threads": False}
    for batch in file.iter_batches(ROWS_AT_ONCE, **options):
        batches.append(batch)
        size += batch.nbytes
        if size > max_bytes:
            raise ValueError(f"its rows have more than {max_bytes} bytes, the limit given by its index")
    return Table.from_batches(batches)


class ArrowTable(TableFile):
    """An Arrow file, as written by `save_to_disk`; its groups are its record batches, mapped unless compressed."""

    def __init__(self, path: Path) -> None:
        from pyarrow import ipc, memory_map

        source = memory_map(os.fspath(path))
        is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
        begin, limit = STREAM_BEGIN if is_file else 0, MAX_GROWTH * source.size() + MIN_DECOMPRESSED
        source.seek(begin)
        if (size := arrow_bodies.decompressed_bytes(source)) > limit:
            raise ValueError(f"it claims {size} decompressed bytes, more than {limit}: write it uncompressed")
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
            batch.validate(full=True)  # offsets in a damaged file may point outside it
        except TABLE_ERRORS as error:
            raise InputError(f"{self.path} is damaged in batch {group} ({one_line(error)})") from error
        return Table.from_batches([batch])


def open_table(path: Path) -> TableFile:
    """Opens a Parquet or Arrow file, depending on its suffix.

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


# Groups are read without threads, which a process forked later would not inherit.
cached_group = lru_cache(maxsize=CACHED_GROUPS)(read_group)
cached_arrow = lru_cache(maxsize=None)(
    ArrowTable
)  # mapped, or at most `MAX_GROWTH` times the size of a compressed file


def texts_of(column: Any, path: Path) -> list[Any]:
    """Returns the values of a column of numbers or texts; they may be null.

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
            raise ValueError(f"a name or path has {longest} bytes, more than {MAX_NAME_BYTES}")
    values = choices.to_pylist()
    if choices is chunk:
        return list(values)
    return [None if i is None else values[i] for i in chunk.indices.to_pylist()]  # repeated texts are shared
