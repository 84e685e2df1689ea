"""Command lines from typed functions."""

from __future__ import annotations

from collections.abc import Callable

from jsonargparse import auto_cli


def call(function: Callable[..., None], argv: list[str]) -> None:
    """Call `function` with the options in `argv`, whose first word is the command's name.

    Raises:
        argparse.ArgumentError: if the options do not fit the function's signature.
    """
    auto_cli(function, args=argv[1:], prog=f"lightning-mvar {argv[0]}", as_positional=False, exit_on_error=False)
