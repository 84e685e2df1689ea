"""Command lines from typed functions."""

from __future__ import annotations

from collections.abc import Callable

from jsonargparse import auto_cli, capture_parser

from lightning_mvar.errors import InputError


def call(
    function: Callable[..., None] | dict[str, Callable[..., None]],
    argv: list[str],
    positional: bool = False,
    description: str | None = None,
) -> None:
    """Call `function` with the options in `argv`, whose first word is the command's name.

    Args:
        function: whose arguments are the options, or several by name, of which the second word names one.
        argv: the command line.
        positional: required arguments are words instead of options.
        description: of several functions together.

    Raises:
        argparse.ArgumentError: if the options do not fit the function's signature.
        InputError: what the function raises, or a class that an option names.
    """
    try:
        auto_cli(
            function,  # type: ignore[arg-type]  # its dict has other kinds of values, too
            args=argv[1:],
            prog=f"lightning-mvar {argv[0]}",
            as_positional=positional,
            exit_on_error=False,
            description=description,
        )
    except ValueError as error:
        mistake = behind(error)
        raise error if mistake is None else mistake from None


def check(function: Callable[..., None], argv: list[str]) -> None:
    """Parse the options in `argv` as `call` does, and call nothing.

    Raises:
        argparse.ArgumentError: if the options do not fit the function's signature.
    """
    parser = capture_parser(lambda: auto_cli(function, as_positional=False, exit_on_error=False))
    parser.parse_args(argv[1:])


def behind(error: BaseException | None) -> InputError | None:
    """What a class that the command line names had to say of its arguments: the parser wraps it in words of its own."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
