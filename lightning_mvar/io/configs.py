"""Configuration files: those of the package, and files that other files include."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_mvar.errors import one_line
from lightning_mvar.io.json_files import ESCAPED

PACKAGED = Path(__file__).parents[1] / "configs"  # in a clone, a link to its top-level folder
INCLUDED = re.compile(r"^[^#\n]*?[:-] +(\S+\.ya?ml) *$", re.MULTILINE)  # a value that is the path of another YAML file
MAX_NODES = 100_000  # values in a YAML file after expanding its aliases
# Raised by yaml for invalid YAML, and for values such as 2023-02-30, !!int "abc", !!bool x, !!timestamp x.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError)


def find_config(name: str) -> str:
    """Returns the path of a configuration file: `name` or, if it does not exist, the package's file of that name.

    Args:
        name: path of a file, or the name of a package file such as `configs/size/d16.yaml`, `size/d16.yaml` for short.
    """
    packaged = PACKAGED / name.removeprefix("configs/")
    return str(packaged) if not Path(name).exists() and packaged.is_file() else name


def config_words(words: Sequence[str]) -> list[tuple[int, str, str]]:
    """Finds the values of --config in a command line; returns the index of the word, its prefix and the value."""
    found = []
    for i, (before, word) in enumerate(pairwise(["", *words])):
        prefix = "--config=" if word.startswith("--config=") else ""
        if prefix or before in ("-c", "--config"):
            found.append((i, prefix, word.removeprefix(prefix)))
    return found


def with_included(path: Path) -> list[Path]:
    """Returns a YAML file and, recursively, the existing YAML files that its values name relative to it, each once."""
    files, seen, stack = [], set(), [path]
    while stack:
        file = stack.pop()
        if file.resolve() in seen:
            continue
        seen.add(file.resolve())
        files.append(file)
        named = [file.parent / name for name in INCLUDED.findall(file.read_text(errors="replace"))]
        stack += [other for other in reversed(named) if other.is_file()]
    return files


def compose(text: str) -> yaml.Node | None:
    """Returns the root node of a YAML text.

    Raises:
        yaml.YAMLError: if the text is not valid YAML, contains characters that are illegal in paths, or has more than
            MAX_NODES values after expanding its aliases.
        RecursionError: if it is nested too deeply, or an alias refers to itself.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and written_size(root, {}) > MAX_NODES:
        raise yaml.YAMLError(f"its aliases stand for more than {MAX_NODES} values")
    return root


def yaml_problem(error: Exception) -> str:
    """Returns the message of one of `YAML_ERRORS` on one line, without PyYAML's name for the text."""
    return one_line(error).replace('in "<unicode string>", ', "in ")


def written_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Counts the values in a node after expanding its aliases; `sizes` caches the counts of nodes by id."""
    if isinstance(node, yaml.ScalarNode):
        if ESCAPED.search(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a character that no path can hold")
        return 1
    if id(node) not in sizes:
        children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(written_size(child, sizes) for child in children)
    return sizes[id(node)]
