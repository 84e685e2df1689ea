"""Placeholders in a sweep file's command lines: `{seed}`, `{out}` for the cell's folder, `{AXIS}` for its value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z_]\w*)\}")  # `${...}` is an interpolation of configs


def placeholders(args: Iterable[str]) -> list[str]:
    """Returns the names of all placeholders in a command line."""
    return [name for arg in args for name in PLACEHOLDER.findall(arg)]


def fill(args: Iterable[str], values: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Replaces placeholders; one that is a whole argument becomes all arguments of its value."""
    filled: list[str] = []
    for arg in args:
        if whole := PLACEHOLDER.fullmatch(arg):
            filled += values[whole[1]]
        else:
            filled.append(PLACEHOLDER.sub(lambda match: " ".join(values[match[1]]), arg))
    return tuple(filled)
