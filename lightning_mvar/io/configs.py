"""Configuration files and those that they include."""

from __future__ import annotations

import re
from pathlib import Path

INCLUDED = re.compile(r"^[^#\n]*?[:-] +(\S+\.ya?ml) *$", re.MULTILINE)  # a value that is the path of another YAML file


def with_included(path: Path) -> list[Path]:
    """Returns a YAML file and the existing ones that its values name, relative to it, at any depth."""
    named = [path.parent / name for name in INCLUDED.findall(path.read_text())]
    return [path, *(other for file in named if file.is_file() for other in with_included(file))]
