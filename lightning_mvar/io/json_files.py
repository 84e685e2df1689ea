"""JSON files: written atomically, and checked against the types of a dataclass when they are read.

We use our own reader because each library lacks something: msgspec supports no unions of tuples and ignores unknown
fields, pydantic needs its settings in each dataclass, and neither names the offending value.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_mvar.errors import InputError, one_line
from lightning_mvar.io.files import atomic_path, read_regular

T = TypeVar("T")

MAX_JSON_BYTES = 2**24  # per file; parsed JSON takes up to 20 times as much memory
SHOWN = 80  # characters of a value that a message shows
ESCAPED = re.compile("[\0\ud800-\udfff]")  # characters that are illegal in paths or UTF-8 files
SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {  # type: (name in messages, check)
    NoneType: ("null", lambda value: value is None),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("an integer of 64 bits", lambda value: type(value) is int and -(2**63) <= value < 2**63),
    float: ("a finite number", lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max),
    str: ("a string without NUL", lambda value: isinstance(value, str) and not ESCAPED.search(value)),
}


class FormatVersion(NamedTuple):
    """The format_version that this release reads, and the remedy for other versions."""

    number: int
    remedy: str


class Mismatch(Exception):
    """A JSON value does not have the expected type; the message starts with the path of its field."""


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Writes a value of plain types to a JSON file atomically; raises InputError if the file cannot be written."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


def read_json(path: Path, kind: type[T], max_bytes: int = MAX_JSON_BYTES, version: FormatVersion | None = None) -> T:
    """Reads a JSON file as an instance of `kind`; see `parse_json`.

    Raises:
        InputError: if the file is missing, not a regular file or larger than `max_bytes`, or its content does not fit.
    """
    return parse_json(read_regular(path, max_bytes), kind, str(path), version)


def parse_json(data: str | bytes, kind: type[T], source: str, version: FormatVersion | None = None) -> T:
    """Parses JSON as an instance of `kind`, strictly: only lists are converted to tuples and ints to floats.

    Args:
        data: the JSON text, in UTF-8.
        kind: a dataclass, whose fields without a default are required; or bool, int, float, str, None, Any, Literal,
            a list, tuple or dict of them, or a union. Integers have 64 bits and numbers are finite.
        source: names the data in messages.
        version: version that the data must have; it is checked before the other fields.

    Raises:
        InputError: if the data is not valid JSON, repeats a field, does not fit `kind` or is refused by a
            `__post_init__`; one line that names source, field and value.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=without_repeats, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON ({error})") from error
    if version is not None:
        check_version(value, version, source)
    return checked(value, kind, source)


def check_version(value: Any, version: FormatVersion, source: str) -> None:
    found = value.get("format_version") if isinstance(value, dict) else None
    if type(found) is not int or found != version.number:
        what = "no format_version" if found is None else f"format_version {shown(found)}"
        raise InputError(f"{source} has {what}; this release reads {version.number}: {version.remedy}")


def checked(value: Any, kind: type[T], source: str) -> T:
    """Converts a value of plain Python types that was read from a file to an instance of `kind`; see `parse_json`.

    Raises:
        InputError: if it does not fit.
    """
    try:
        converted: T = convert(value, kind, "")
    except Mismatch as error:
        raise InputError(f"{source}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{source} is nested too deeply") from error
    return converted


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it repeats the field {shown(name)}")
        values[name] = value
    return values


def refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def convert(value: Any, kind: Any, path: str) -> Any:
    """Converts a JSON value to an instance of `kind`; `path` names it in messages."""
    origin, parameters = get_origin(kind), get_args(kind)
    if kind is Any:
        convert_any(value, path)
        return value
    if kind in SCALARS and SCALARS[kind][1](value):
        return float(value) if kind is float else value
    if origin is Literal and any(type(value) is type(choice) and value == choice for choice in parameters):
        return value
    if origin in (Union, UnionType):
        return convert_union(value, kind, path)
    if is_dataclass(kind) and isinstance(value, dict):
        return convert_dataclass(value, kind, path)
    if origin is dict and isinstance(value, dict):
        paths = {convert(name, str, field_path(path, name)): field_path(path, name) for name in value}
        return {name: convert(value[name], parameters[1], path) for name, path in paths.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        kinds = element_kinds(kind, len(value))
        if len(kinds) == len(value):
            return origin(convert(v, k, f"{path}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    raise Mismatch(f"{path or 'the content'} is {shown(value)}; it must be {describe(kind)}")


def convert_any(value: Any, path: str) -> None:
    """Raises Mismatch if a value of any type contains a number that is not finite or a forbidden character."""
    if isinstance(value, dict):
        convert(value, dict[str, Any], path)
    elif isinstance(value, list | tuple):
        convert(value, list[Any], path)
    else:
        convert(value, type(value), path)


def convert_union(value: Any, kind: Any, path: str) -> Any:
    members = [member for member in get_args(kind) if member is not NoneType or value is None]
    if len(members) == 1:  # a direct call names the part of the value that does not fit
        return convert(value, members[0], path)
    for member in members:
        try:
            return convert(value, member, path)
        except Mismatch:
            continue
    raise Mismatch(f"{path or 'the content'} is {shown(value)}; it must be {describe(kind)}")


def convert_dataclass(values: dict[str, Any], kind: Any, path: str) -> Any:
    known = {field.name: field for field in fields(kind) if field.init}
    if unknown := [name for name in values if name not in known]:
        raise Mismatch(f"{field_path(path, unknown[0])} is not a field of this version; it knows {', '.join(known)}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise Mismatch(f"{field_path(path, name)} is missing; it must be {describe(type_hints(kind)[name])}")
    converted = {name: convert(value, type_hints(kind)[name], field_path(path, name)) for name, value in values.items()}
    try:
        return kind(**converted)
    except (ValueError, ArithmeticError) as error:  # of __post_init__
        raise Mismatch(one_line(error)) from error


@cache
def type_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def element_kinds(kind: Any, count: int) -> list[Any]:
    """Returns the type of each of `count` elements of a list, or of the elements that a tuple type has."""
    parameters = list(get_args(kind))
    if get_origin(kind) is list or parameters[1:] == [...]:
        return parameters[:1] * count
    return parameters


def describe(kind: Any) -> str:
    """Describes a type for a message."""
    origin, parameters = get_origin(kind), get_args(kind)
    if kind in SCALARS:
        return SCALARS[kind][0]
    if origin is Literal:
        return f"one of {', '.join(map(repr, parameters))}"
    if origin in (Union, UnionType):
        return " or ".join(map(describe, parameters))
    if origin in (list, tuple):
        repeated = origin is list or parameters[1:] == (...,)
        return f"[{f'{describe(parameters[0])}, ...' if repeated else ', '.join(map(describe, parameters))}]"
    return "an object"


def field_path(path: str, name: Any) -> str:
    field = name if isinstance(name, str) and name.isidentifier() and len(name) <= SHOWN else shown(name)
    return f"{path}.{field}" if path else field


def shown(value: Any) -> str:
    """Formats the beginning of a value on one line."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = SHOWN
    return " ".join(brief.repr(value).split())
