"""Images in Parquet files as Hugging Face's `datasets` writes them: a column of bytes and paths, and one of labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lightning_mvar.data.images.files import EncodedImages
from lightning_mvar.errors import InputError

HELD_GROUPS = 2  # row groups that a process keeps: images of a batch come from one or two


class ParquetImages(EncodedImages):
    """Images of one Parquet file or several.

    A row group is read as a whole, so that images are best read group by group, see `groups`.

    Args:
        paths: of the files.
        class_names: in label order, where the files do not have them.

    Raises:
        InputError: if pyarrow is not installed, or a file is damaged or has no images and labels.
    """

    def __init__(self, paths: Sequence[Path], class_names: Sequence[str] | None) -> None:
        self.paths = list(paths)
        found = {path: columns(path) for path in self.paths}
        self.image, self.label, names = found[self.paths[0]]
        if other := next((path for path, has in found.items() if has != found[self.paths[0]]), None):
            raise InputError(f"{other} has other columns or classes than {self.paths[0]}")
        stems: list[str] = []
        labels: list[int] = []
        places: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.paths):
            for group in range(open_parquet(path).num_row_groups):
                table = read_group(path, group, (f"{self.image}.path", self.label))
                inside = [(row or {}).get("path") for row in table.column(self.image).to_pylist()]
                stems += [PurePosixPath(p or f"{path.stem}-{group}-{i}").name for i, p in enumerate(inside)]
                labels += table.column(self.label).to_pylist()
                places += [(number, group, row) for row in range(len(inside))]
        if None in labels or not labels or min(labels) < 0:
            raise InputError(f"{self.paths[0]} and the like have images without a label: leave those rows out")
        known = class_names if class_names is not None else names or [str(i) for i in range(max(labels) + 1)]
        if max(labels) >= len(known):
            raise InputError(f"{self.paths[0]} and the like have the class {max(labels)}, of {len(known)} with a name")
        keys = [f"{known[label]}/{stem}" for label, stem in zip(labels, stems, strict=True)]
        super().__init__(known, keys, labels, np.array(places, np.int64))
        _, self.groups = np.unique(self.places[:, :2], axis=0, return_inverse=True)

    def files(self) -> Iterable[Path]:
        return self.paths

    def where(self, index: int) -> str:
        return f"{self.paths[int(self.places[index, 0])]}: {self.key(index)}"

    def read(self, index: int) -> bytes:
        number, group, row = self.places[index].tolist()
        column = held_group(self.paths[number], group, (f"{self.image}.bytes",)).column(self.image)
        return bytes((column[row].as_py() or {}).get("bytes") or b"")  # without bytes it cannot be decoded


def open_parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(f"{path} needs pyarrow to be read: pip install 'lightning-mvar[parquet]'") from error
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise InputError(f"{path} is damaged or no Parquet file ({' '.join(str(error).split())})") from error


def columns(path: Path) -> tuple[str, str, list[str]]:
    """The columns of images and of labels, and the classes' names, if they are there."""
    schema = open_parquet(path).schema_arrow
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    images = [field.name for field in schema if str(field.type).startswith("struct<bytes: binary, path: string")]
    labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    labels = labels or [field.name for field in schema if field.name == "label"]
    if not images or not labels or labels[0] not in schema.names or "int" not in str(schema.field(labels[0]).type):
        raise InputError(
            f"{path} has the columns {', '.join(schema.names)}: expected images, as structs of bytes and path, and "
            f"`label`, a number"
        )
    return images[0], labels[0], features.get(labels[0], {}).get("names") or []


def read_group(path: Path, group: int, wanted: tuple[str, ...]) -> Any:
    try:
        return open_parquet(path).read_row_group(group, columns=list(wanted), use_threads=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged in row group {group} ({' '.join(str(error).split())})") from error


# Without threads, which a process that is forked off afterwards would lack.
held_group = lru_cache(maxsize=HELD_GROUPS)(read_group)
