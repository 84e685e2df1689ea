"""Selection of the columns of a table that hold images and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_mvar.data.images.class_words import LABEL_FIELDS
from lightning_mvar.errors import InputError
from lightning_mvar.io.json_files import parse_json

NAME_COLUMNS = ("file_name", "filename", "file", "path", "filepath", "file_path", "image_path", "image_file", "image")


class Columns(NamedTuple):
    """The columns of a set of images.

    Args:
        image: column of the images.
        kind: type of its values: a struct of bytes and path, bytes, or the path of a file.
        label: column of the classes, as numbers or names.
        has_names: whether the classes are names.
        class_names: class names in label order, if the file has them.
        key: column with the names of the images without suffix, if any.
    """

    image: str
    kind: Literal["struct", "bytes", "path"]
    label: str
    has_names: bool
    class_names: tuple[str, ...]
    key: str | None


def find_columns(path: Path, schema: Any, choice: str) -> Columns:
    """Returns the columns of a table's schema.

    Args:
        path: the file, for messages.
        schema: a pyarrow schema, perhaps with the metadata of Hugging Face's `datasets`.
        choice: LABEL or IMAGE,LABEL if several columns are possible; "" if there is only one.

    Raises:
        InputError: if there is no such column, or there are several candidates.
    """
    image_choice, _, label_choice = choice.rpartition(",")
    features = features_of(path, schema)
    kinds = {field.name: kind for field in schema if (kind := image_kind(field))}
    stored = {name: kind for name, kind in kinds.items() if kind != "path"} or kinds
    images = [image_choice] if image_choice else list(stored)
    class_labels = [
        name
        for name, feature in features.items()
        if name in schema.names and isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    ]
    labels = class_labels or [name for name in schema.names if name.lower() in LABEL_FIELDS and name not in images]
    labels = [label_choice] if label_choice else [name for name in labels if label_kind(schema.field(name))]
    known = all(name in schema.names for name in (*images, *labels))
    if not images or not labels or not known or images[0] not in kinds or not label_kind(schema.field(labels[0])):
        raise InputError(
            f"{path} has the columns {', '.join(schema.names)}: expected an image column (bytes and path, bytes, or "
            f"paths of files) and `label`, a number or a name; choose with --labels LABEL or --labels IMAGE,LABEL"
        )
    if len(images) > 1 or len(labels) > 1:
        what, choices = ("images", images) if len(images) > 1 else ("classes", labels)
        raise InputError(
            f"{path} has several columns of {what} ({', '.join(choices)}): choose one, such as --labels "
            f"{f'{images[0]},' if len(images) > 1 else ''}{labels[0]}"
        )
    feature = features.get(labels[0])
    names = feature.get("names") if isinstance(feature, dict) else None
    class_names = tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
    key = next((name for name in ("__key__",) if name in schema.names), None)
    has_names = label_kind(schema.field(labels[0])) == "name"
    return Columns(images[0], kinds[images[0]], labels[0], has_names, class_names, key)


def features_of(path: Path, schema: Any) -> dict[str, Any]:
    """Returns the features by column that `datasets` stored in the schema; empty if there are none."""
    data = (schema.metadata or {}).get(b"huggingface")
    metadata = {} if data is None else parse_json(data, dict[str, Any], f"the metadata of {path}")
    info = metadata.get("info")
    features = info.get("features") if isinstance(info, dict) else None
    return features if isinstance(features, dict) else {}


def image_kind(field: Any) -> Literal["struct", "bytes", "path"] | None:
    """Returns how a column may hold images, judging by its type and, for paths, its name; None if it cannot."""
    from pyarrow import types  # type: ignore[import-untyped]

    def is_bytes(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    if types.is_struct(field.type):
        fields = {field.type.field(i).name: field.type.field(i).type for i in range(field.type.num_fields)}
        return "struct" if "bytes" in fields and is_bytes(fields["bytes"]) else None
    if is_bytes(field.type):
        return "bytes"
    return "path" if is_text(field.type) and field.name.lower() in NAME_COLUMNS else None


def label_kind(field: Any) -> Literal["number", "name"] | None:
    from pyarrow import types

    if types.is_integer(field.type):
        return "number"
    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    return "name" if is_text(kind) else None


def is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))
