"""Command-line parsers built from typed functions, and checks of the parsed options."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, auto_cli, capture_parser
from PIL import Image

from lightning_mvar.cli.help import POSITIONAL
from lightning_mvar.data.images.compressed import TAR_SUFFIXES
from lightning_mvar.errors import InputError

METADATA_FILES = ("config.json", "manifest.json")  # of exported networks and of token shards
READ_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".distcp", ".parquet", ".arrow", *TAR_SUFFIXES)
MAY_BE_EMPTY = re.compile(r"\.(init_args|dict_kwargs|host|allowed_hosts)\b")  # options of classes; hosts
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)
BOOL_METAVAR = "{true,false}"  # jsonargparse's metavar of options of type bool
MODULES = re.compile(r"lightning_mvar\.metrics\.\w+")  # extractors and classifiers, the only modules that options take
SUBCLASSES = ", known subclasses: "  # how jsonargparse introduces the classes that an option accepts


class CommandParser(ArgumentParser):
    """Parser whose boolean options also work as flags, and whose help lists only this package's classes.

    Options of type tuple[X, ...] take one or more words; those of type list[X] take one word, [x, y].
    """

    def add_function_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own pattern takes -1e-3 for an option
        added = super().add_function_arguments(*args, **kwargs)
        for action in self._actions:
            if action.metavar == BOOL_METAVAR:
                action.nargs, action.const = "?", True
            if (element := repeated_type(getattr(action, "_typehint", None))) is not None:
                action.nargs, action.metavar, action._typehint = "+", None, element  # type: ignore[attr-defined]
            if hasattr(action, "extra_help"):
                action.extra_help = partial(list_own_classes, action.extra_help)
        return added

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        return check_values(super().parse_args(*args, **kwargs))


def repeated_type(kind: Any) -> Any:
    """Returns X if `kind` is tuple[X, ...] or tuple[X, ...] | None; None otherwise."""
    members = [kind, *get_args(kind)] if NoneType in get_args(kind) else [kind]
    tuples = [get_args(member) for member in members if get_origin(member) is tuple]
    return tuples[0][0] if tuples and tuples[0][1:] == (...,) else None


def check_values(value: Any, name: str = "") -> Any:
    """Returns parsed options with a leading `~` expanded in each string: shells do not expand it in `--out=~/x`.

    Raises:
        InputError: if a number is not finite, or a string is empty, which as a path would mean the current folder. Only
            options of classes may be empty, such as the name of a logger.
    """
    if isinstance(value, Namespace):
        return Namespace({key: check_values(item, f"{name}.{key}") for key, item in vars(value).items()})
    if isinstance(value, dict):
        return {key: check_values(item, f"{name}.{key}") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(check_values(item, f"{name}[{i}]") for i, item in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name.lstrip('.')} is {value}; use a finite number")
    if value == "" and not MAY_BE_EMPTY.search(name):
        raise InputError(f"--{name.lstrip('.')} is empty; give it a value")
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def list_own_classes(extra_help: Callable[[], str]) -> str:
    """Removes classes of other packages from the help of an option: torch alone has hundreds of modules."""
    classes = [name for name in extra_help().removeprefix(SUBCLASSES).split(", ") if MODULES.fullmatch(name)]
    return SUBCLASSES + ", ".join(classes) if classes else ""


def call(function: Callable[..., None] | dict[str, Callable[..., None]], argv: list[str]) -> None:
    """Calls a function with the options in `argv`, whose first word is the name of the command.

    Args:
        function: function whose arguments are the options, or functions by subcommand name.
        argv: command line.

    Raises:
        argparse.ArgumentError: if the options do not match the function's signature.
        InputError: if the function raises it, or a class named by an option does.
    """
    try:
        auto_cli(
            function,  # type: ignore[arg-type]  # its dict type is invariant and has other values, too
            args=argv[1:],
            prog=f"lightning-mvar {argv[0]}",
            as_positional=argv[0] in POSITIONAL,
            exit_on_error=False,
            parser_class=CommandParser,
        )
    except ValueError as error:
        input_error = find_input_error(error)
        raise error if input_error is None else input_error from None


def check(function: Callable[..., None], argv: list[str]) -> None:
    """Parses the options in `argv` like `call`, without calling the function.

    Raises:
        argparse.ArgumentError: if the options do not match the function's signature.
    """
    parser = capture_parser(
        lambda: auto_cli(function, as_positional=False, exit_on_error=False, parser_class=CommandParser)
    )
    parser.parse_args(argv[1:])


def refuse_overwriting(outputs: Mapping[str, str | Path | None], inputs: Mapping[str, str | None]) -> None:
    """Checks that a command overwrites none of its inputs, and that its outputs have different paths.

    Args:
        outputs: files or folders to write, by option; None for an option without a value.
        inputs: files, folders or names of sources to read, by option.

    Raises:
        InputError: if an output is an input, a file read from an input folder, or another output.
    """
    read = {option: os.path.realpath(path) for option, path in inputs.items() if path is not None}
    written: dict[str, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        target = os.path.realpath(path)
        for other, source in read.items():
            if target == source or is_read_from(Path(source), Path(target)):
                raise InputError(
                    f"{option} {path} would overwrite the input {other} {inputs[other]}: choose another path"
                )
        for other, earlier in written.items():
            if target == earlier:
                raise InputError(f"{option} and {other} are both {path}: choose two different paths")
        written[option] = target


def require_suffix(suffixes: tuple[str, ...], paths: Mapping[str, str | None]) -> None:
    """Raises InputError unless the paths, keyed by option, have one of the suffixes; None passes."""
    for option, path in paths.items():
        if path is not None and not path.lower().endswith(suffixes):
            raise InputError(f"{option} {path} must end in {' or '.join(suffixes)}")


def is_read_from(folder: Path, path: Path) -> bool:
    """Returns whether a path is an existing file that is read from a folder: metadata, weights, data or an image."""
    if folder not in path.parents or not path.is_file():
        return False
    is_image = path.suffix.lower() in Image.registered_extensions() and not (folder / "config.json").exists()
    return path.name in METADATA_FILES or path.name.endswith(READ_SUFFIXES) or is_image


def find_input_error(error: BaseException | None) -> InputError | None:
    """Returns the InputError among the causes of an error, if any: jsonargparse wraps those of classes it builds."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
