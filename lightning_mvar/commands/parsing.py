"""Command lines from typed functions."""

from __future__ import annotations

from collections.abc import Callable

from jsonargparse import auto_cli


def call(function: Callable[..., None], argv: list[str], positional: bool = False) -> None:
    """Call `function` with the options in `argv`, whose first word is the command's name.

    Args:
        function: whose arguments are the options.
        argv: the command line.
        positional: required arguments are words instead of options.

    Raises:
        argparse.ArgumentError: if the options do not fit the function's signature.
    """
    auto_cli(function, args=argv[1:], prog=f"lightning-mvar {argv[0]}", as_positional=positional, exit_on_error=False)
