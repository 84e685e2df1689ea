"""Images in Parquet or Arrow files, as written by Hugging Face's `datasets` and others.

One column holds the images: bytes, structs of bytes and path, or paths of files below the table's folder. Another
column holds the classes: numbers or names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lightning_mvar.data.images.class_words import MAX_CLASSES, labels_from_words
from lightning_mvar.data.images.columns import Columns, find_columns
from lightning_mvar.data.images.decoding import UnusableFileError, check_bytes, read_file
from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.data.images.table_files import CACHED_GROUPS, TableFile, cached_group, open_table, texts_of
from lightning_mvar.errors import InputError


class TableImages(EncodedImages):
    """Images of one or more Parquet or Arrow files.

    Files are read by complete row groups, so images are best read group by group (see `groups`).

    Args:
        paths: the files.
        class_names: class names in label order; by default those in the files, or the numbers or names that occur.
        columns: the columns to use, as LABEL or IMAGE,LABEL, if several are possible.

    Raises:
        InputError: if pyarrow is not installed, or a file is damaged or lacks images or labels.
    """

    columns: Columns

    def __init__(self, paths: Sequence[Path], class_names: Sequence[str] | None, columns: str = "") -> None:
        self.paths = list(paths)
        names: list[str] = []  # of the images; for paths, relative to the file's folder
        values: list[Any] = []  # class of each image
        locations: list[tuple[int, int, int, int]] = []
        for number, path in enumerate(self.paths):
            table = open_table(path)
            found = find_columns(path, table.schema, columns)
            if number and found != self.columns:
                raise InputError(f"{path} has other columns or classes than {self.paths[0]}")
            self.columns = found
            for group in range(table.num_groups):
                for row, (name, value) in enumerate(self.rows_of(table, group)):
                    locations.append((number, group, row, len(values)))
                    names.append(name)
                    values.append(value)
        classes, labels = self.labels_of(values, class_names)
        keys = [f"{classes[label]}/{PurePosixPath(name).name}" for label, name in zip(labels, names, strict=True)]
        if len(set(keys)) < len(keys):
            places = [f"{self.paths[number].stem}-{group}-{row}" for number, group, row, _ in locations]
            keys = [key.replace("/", f"/{place}-") for key, place in zip(keys, places, strict=True)]
        # An array, so that loader workers share its memory.
        self.names = np.array([name.encode() for name in names], dtype=bytes) if self.columns.kind == "path" else None
        super().__init__(classes, keys, labels, np.array(locations, np.int64))
        groups, group_of_image = np.unique(self.locations[:, :2], axis=0, return_inverse=True)
        self.groups = group_of_image if len(groups) > CACHED_GROUPS else None

    def rows_of(self, table: TableFile, group: int) -> Iterator[tuple[str, Any]]:
        """Yields the name and class of each image in a row group."""
        image, kind, label, _, _, key = self.columns
        if kind == "struct":
            source = f"{image}.path" if table.has_field(image, "path") else None
        else:
            source = image if kind == "path" else None
        source = key if source is None else source
        selected = table.read(group, [label, *([] if source is None else [source])])
        values = texts_of(selected.column(label), table.path)
        names = [None] * len(values) if source is None else texts_of(column_of(selected, source), table.path)
        suffix = f".{image}" if source is not None and source == key else ""
        for row, (name, value) in enumerate(zip(names, values, strict=True)):
            yield (f"{name}{suffix}" if name else f"{table.path.stem}-{group}-{row}"), value

    def labels_of(self, values: list[Any], class_names: Sequence[str] | None) -> tuple[list[str], list[int]]:
        """Returns the class names in label order and the label of each image."""
        source = f"{self.paths[0]}, ..."
        if not values or any(value is None or value == "" for value in values):
            raise InputError(f"{source}: some images have no label; remove those rows")
        if self.columns.has_names:
            return labels_from_words(values, class_names, source, "never")
        if min(values) < 0:
            raise InputError(f"{source}: some images have no label ({min(values)}); remove those rows")
        names = list(class_names if class_names is not None else self.columns.class_names)
        if not names and max(values) < MAX_CLASSES:
            names = [str(label) for label in range(max(values) + 1)]
        if max(values) >= len(names):
            raise InputError(f"{source}: there is a label {max(values)}, but only {len(names)} class names")
        return names, values

    def files(self) -> Iterable[Path]:
        yield from self.paths
        if self.columns.kind == "path":
            yield from (path for i in range(len(self)) if (path := self.path_of(i)).exists())

    def path_of(self, index: int) -> Path:
        number, _, _, position = self.locations[index].tolist()
        assert self.names is not None
        return file_below(self.paths[number].parent, bytes(self.names[position]).decode())

    def display_path(self, index: int) -> str:
        return f"{self.paths[int(self.locations[index, 0])]}: {self.key(index)}"

    def read(self, index: int) -> bytes:
        if self.columns.kind == "path":
            return read_file(self.path_of(index))
        number, group, row, _ = self.locations[index].tolist()
        path, image = self.paths[number], self.columns.image
        if self.columns.kind == "bytes":
            data = cached_group(path, group, (image,)).column(image)[row].as_py()
        else:
            data = (cached_group(path, group, (f"{image}.bytes",)).column(image)[row].as_py() or {}).get("bytes")
        if data is not None:
            check_bytes(len(data))
        elif self.columns.kind == "struct" and open_table(path).has_field(image, "path"):
            cell = cached_group(path, group, (f"{image}.path",)).column(image)[row].as_py() or {}
            if cell.get("path"):
                return read_file(file_below(path.parent, cell["path"]))
        return data or b""  # decoding no bytes fails


def column_of(table: Any, name: str) -> Any:
    """Returns a column, or the field of a struct column for `column.field`."""
    from pyarrow import compute  # type: ignore[import-untyped]

    if name in table.column_names:
        return table.column(name)
    column, _, field = name.rpartition(".")
    return compute.struct_field(table.column(column), field)


def file_below(folder: Path, name: str) -> Path:
    """Returns the path of a file that a table names relative to its folder.

    Raises:
        UnusableFileError: if the path leaves the folder, or the file does not exist.
    """
    path = folder / name.replace("\0", "\ufffd")
    real, real_folder = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([real, real_folder]) != real_folder:
        raise UnusableFileError(f"its path {name!r} leaves the folder of the table")
    if not path.exists():
        raise UnusableFileError(f"its file {name!r} does not exist")
    return path
