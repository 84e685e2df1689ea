"""Images in Parquet files of Hugging Face's `datasets`: one column of bytes and paths, one of labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.errors import InputError

CACHED_GROUPS = 2  # row groups cached per process: a batch reads from one or two


class ParquetImages(EncodedImages):
    """Images of one or more Parquet files.

    Files are read by complete row groups, so images are best read group by group (see `groups`).

    Args:
        paths: the files.
        class_names: class names in label order, if the files have none.

    Raises:
        InputError: if pyarrow is not installed, or a file is damaged or lacks images or labels.
    """

    def __init__(self, paths: Sequence[Path], class_names: Sequence[str] | None) -> None:
        self.paths = list(paths)
        schemas = {path: find_columns(path) for path in self.paths}
        self.image_column, self.label_column, names = schemas[self.paths[0]]
        if other := next((path for path, schema in schemas.items() if schema != schemas[self.paths[0]]), None):
            raise InputError(f"{other} has other columns or classes than {self.paths[0]}")
        stems: list[str] = []
        labels: list[int] = []
        locations: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.paths):
            for group in range(open_parquet(path).num_row_groups):
                table = read_group(path, group, (f"{self.image_column}.path", self.label_column))
                image_paths = [(row or {}).get("path") for row in table.column(self.image_column).to_pylist()]
                stems += [PurePosixPath(p or f"{path.stem}-{group}-{i}").name for i, p in enumerate(image_paths)]
                labels += table.column(self.label_column).to_pylist()
                locations += [(number, group, row) for row in range(len(image_paths))]
        if None in labels or not labels or min(labels) < 0:
            raise InputError(f"{self.paths[0]}, ...: some images have no label; remove those rows")
        classes = class_names if class_names is not None else names or [str(i) for i in range(max(labels) + 1)]
        if max(labels) >= len(classes):
            raise InputError(
                f"{self.paths[0]}, ...: there is a label {max(labels)}, but only {len(classes)} class names"
            )
        keys = [f"{classes[label]}/{stem}" for label, stem in zip(labels, stems, strict=True)]
        super().__init__(classes, keys, labels, np.array(locations, np.int64))
        _, self.groups = np.unique(self.locations[:, :2], axis=0, return_inverse=True)

    def files(self) -> Iterable[Path]:
        return self.paths

    def display_path(self, index: int) -> str:
        return f"{self.paths[int(self.locations[index, 0])]}: {self.key(index)}"

    def read(self, index: int) -> bytes:
        number, group, row = self.locations[index].tolist()
        column = cached_group(self.paths[number], group, (f"{self.image_column}.bytes",)).column(self.image_column)
        return bytes((column[row].as_py() or {}).get("bytes") or b"")  # a row without bytes fails when decoded


def open_parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow: pip install 'lightning-mvar[parquet]'") from error
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:  # base classes of pyarrow's errors
        raise InputError(f"{path} is damaged or not a Parquet file ({' '.join(str(error).split())})") from error


def find_columns(path: Path) -> tuple[str, str, list[str]]:
    """Returns the names of the image and label columns, and the class names if the file has them."""
    schema = open_parquet(path).schema_arrow
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    images = [field.name for field in schema if str(field.type).startswith("struct<bytes: binary, path: string")]
    labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    labels = labels or [field.name for field in schema if field.name == "label"]
    if not images or not labels or labels[0] not in schema.names or "int" not in str(schema.field(labels[0]).type):
        raise InputError(
            f"{path} has the columns {', '.join(schema.names)}: expected an image column (bytes and path) and "
            f"`label`, a number"
        )
    return images[0], labels[0], features.get(labels[0], {}).get("names") or []


def read_group(path: Path, group: int, columns: tuple[str, ...]) -> Any:
    try:
        return open_parquet(path).read_row_group(group, columns=list(columns), use_threads=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged in row group {group} ({' '.join(str(error).split())})") from error


# `read_group` uses no threads, because a process forked afterwards would not inherit them.
cached_group = lru_cache(maxsize=CACHED_GROUPS)(read_group)
