"""Checks of a command line and its configuration files before torch is imported; jsonargparse checks the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_mvar.cli.help import (
    FULL_HELP,
    PARSER_OPTIONS,
    choices_of,
    first_option,
    metavar,
    nearest,
    signatures_of,
)
from lightning_mvar.cli.signatures import Option
from lightning_mvar.errors import InputError
from lightning_mvar.io.configs import YAML_ERRORS, compose, config_words, find_config, yaml_problem

# Text that starts like a number or a list of numbers; jsonargparse checks the rest of it.
NUMBER = re.compile(r"[\[(]?\s*[-+]?\.?(\d|inf|nan).*", re.IGNORECASE)
FILE_KEYS = {"$schema", "<<"}  # keys of any file that are not options
CLASS_KEYS = {"help", "class_path", "init_args", "dict_kwargs"}  # keys of any class
NULLS = ("null", "Null", "NULL", "~")
BOOLS = ("true", "false", "yes", "no", "on", "off")


def check_options(name: str, *words: str) -> None:
    """Checks names, numbers, choices and required options of a command line and its `--config` files.

    Options of classes, such as `--extractor.weights`, are left to jsonargparse.

    Raises:
        InputError: if an option or subcommand is missing or unknown (the message suggests the closest name), a value is
            not a number or not one of the choices, or a file does not exist or is not YAML.
    """
    signatures = signatures_of(name)
    subcommand = words[0] if words and words[0] in signatures else ""
    if subcommand not in signatures:
        if words and words[0].startswith("-"):
            return
        listed = f"it has {', '.join(signatures)}"
        if not words:
            raise InputError(f"{name} needs a subcommand; {listed}")
        raise InputError(f"{name} has no subcommand {words[0]!r}; {nearest(words[0], signatures, listed)}")
    signature = signatures[subcommand].options
    options = {o.name: o for option in signature if not option.positional for o in option.with_fields()}
    command = f"{name} {subcommand}".strip()
    words = words[1:] if subcommand else words
    before = words[: words.index("--") if "--" in words else None]
    for word, following in zip(before, [*before, "--"][1:], strict=True):
        if word.startswith("--"):
            option, equals, value = word[2:].partition("=")
            check_name(command, option.rstrip("+"), options)
            if option in options and (equals or not following.startswith("--")):
                check_value(options[option], value if equals else following)
    for file in config_files(before):
        check_file(command, file, options)
    if not any(word.startswith(("-c", "--config")) for word in before):
        check_required(command, signature, words)


def config_files(words: Sequence[str]) -> list[Path]:
    """Returns the `--config` files, from this folder or else the package; leaves out values that are YAML text."""
    paths = [os.path.expanduser(name) for *_, name in config_words(words)]
    return [Path(find_config(path)) for path in paths if os.path.exists(path) or not re.search(r"[{:]", path)]


def check_file(command: str, path: Path, options: Mapping[str, Option]) -> None:
    """Checks that a `--config` file exists, and the names and values of its options."""
    if not path.exists():
        raise InputError(f"--config {path} does not exist; `lightning-mvar configs` lists the files in the package")
    check_section(command, read_config_file(path), str(path), "", options)


def read_config_file(path: Path) -> yaml.Node | None:
    """Returns the content of a `--config` file; None if it cannot be read here.

    Raises:
        InputError: if it is not YAML.
    """
    if not path.is_file():
        return None  # a pipe can be read only once
    try:
        return compose(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError):
        return None  # jsonargparse reports why
    except YAML_ERRORS as error:
        raise InputError(f"{path} is not valid YAML: {yaml_problem(error)}") from error


def check_section(command: str, node: yaml.Node | None, file: str, prefix: str, options: Mapping[str, Option]) -> None:
    """Checks the keys and scalar values of a section of a file; `prefix` is its name with a trailing dot."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            line = f"{file}, line {key.start_mark.line + 1}"
            raise InputError(f"{line}: a key is a {key.id}: put quotes around text that starts with a brace or bracket")
        if key.value in FILE_KEYS:
            continue
        name = f"{prefix}{key.value}".rstrip("+")
        try:
            check_name(command, name, options)
            if name in options and isinstance(value, yaml.ScalarNode) and value.value:
                check_value(options[name], value.value)
        except InputError as error:
            raise InputError(f"{file}, line {key.start_mark.line + 1}: {error}") from error
        check_section(command, value, file, f"{name}.", options)


def check_required(command: str, options: Sequence[Option], words: tuple[str, ...]) -> None:
    """Raises InputError if a run lacks a required option; the value of its section (`--data FILE`) may contain it."""
    if only_prints(words):
        return
    given = {word[2:].partition("=")[0].rstrip("+") for word in words if word.startswith("--")}
    names = [option.name for option in options if option.required and not option.positional]
    missing = [name for name in names if not any(f"{other}.".startswith(f"{name}.") for other in given)]
    missing = [name for name in missing if name.partition(".")[0] not in given]
    places = [option.name.upper() for option in options if option.positional][len(plain_words(words, options)) :]
    wanted, note = places + [f"--{name}" for name in missing], ""
    if (first := first_option(command, options)) is not None:
        option, value = f"--{first.name}", metavar(first)
        wanted = [f"{value} as its first argument (or {option})" if word == option else word for word in wanted]
        if not first.required and words[:1] == (option,) and words[1:]:
            note = f" ({words[1]} was read as {value})"
    if wanted:
        listed = f"`lightning-mvar {command} --help` lists the options"
        raise InputError(f"{command} needs {', '.join(wanted)}{note}; {listed}")


def only_prints(words: Sequence[str]) -> bool:
    """Returns whether a command line prints help or a configuration instead of running the command."""
    return any(word.startswith(("--print_", FULL_HELP)) or ".help" in word for word in words)


def plain_words(words: Sequence[str], options: Sequence[Option]) -> list[str]:
    """Returns the words that may be positional: not options or their values. A word after a flag may be positional."""
    flags = {"--", *(f"--{option.name}" for option in options if option.kind == "bool")}
    pairs = [(word, before) for before, word in pairwise(["", *words]) if not word.startswith("-")]
    return [word for word, before in pairs if not before.startswith("--") or "=" in before or before in flags]


def check_name(command: str, name: str, options: Mapping[str, Option]) -> None:
    """Raises InputError unless a command has the option, or it may be an argument of an option's class."""
    parts = name.split(".")
    for depth, part in enumerate(parts, start=1):
        prefix = ".".join(parts[:depth])
        has_fields = any(option.startswith(f"{prefix}.") for option in options)
        if part in (PARSER_OPTIONS if depth == 1 else CLASS_KEYS) or (prefix in options and not has_fields):
            return
        if not has_fields:
            given, dashed = "--" + ".".join(parts[: max(depth, 2)]), [f"--{option}" for option in options]
            listed = f"`lightning-mvar {command} --help` lists the options"
            raise InputError(f"{command} has no option {given}; {nearest(given, dashed, listed)}")


def check_value(option: Option, value: str) -> None:
    """Raises InputError if an option that takes a number or one of several choices has another value."""
    types = set(re.findall(r"\w+", option.kind))
    if value.startswith("${") or (value in NULLS and types & {"None", "Optional"}):
        return
    if types & {"int", "float"} and types <= {"int", "float", "tuple", "None"} and not NUMBER.fullmatch(value):
        raise InputError(f"--{option.name} {value} is not a number")
    if types - {"None"} == {"int"} and re.fullmatch(r"[-+]?\d*\.\d*[1-9]\d*", value):
        raise InputError(f"--{option.name} {value} is not an integer")
    choices = choices_of(option)
    known = value.lower() in BOOLS if option.kind == "bool" else value in choices
    if choices and not known:
        listed = f"use {', '.join(choices)}"
        raise InputError(f"--{option.name} {value} is unknown; {nearest(value, choices, listed)}")
