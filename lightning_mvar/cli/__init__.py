"""The command line: `lightning-mvar COMMAND ...`, the same as `python -m lightning_mvar COMMAND ...`.

Exit codes: 0 done; 1 a user's mistake or bad data, told in one message without a traceback; 130 interrupted by
Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

from lightning_mvar import __version__
from lightning_mvar.errors import InputError, Interrupted

BUG = 70  # exit code of an exception that is nobody's mistake but ours

COMMANDS = {  # command: (module that has `main(argv)`, help)
    "fit": ("fit", "train a network on token shards"),
    "validate": ("fit", "teacher-forced loss of a checkpoint on the validation shards"),
    "test": ("fit", "teacher-forced loss of a checkpoint on the test shards"),
    "train-tokenizer": ("train_tokenizer", "train the tokenizer on images"),
    "tokenize": ("tokenize", "turn images into token shards"),
    "shards": ("shards", "check token shards, print what they hold, look at them"),
    "sample": ("sample", "draw images from a checkpoint or an exported folder"),
    "edit": ("edit", "draw a part of a given image anew"),
    "serve": ("serve", "a local web page that draws and in-paints"),
    "evaluate": ("evaluate", "score a checkpoint's samples, or any others"),
    "sweep": ("sweep", "many runs of fit and evaluate from one file"),
    "likelihood": ("likelihood", "bits per token of given images"),
    "reconstruct": ("reconstruct", "compare real images with what a tokenizer makes of them"),
    "export": ("export", "write a checkpoint as one self-contained folder"),
    "bench": ("bench", "measure speed and memory on this machine"),
    "report": ("report", "tables and figures of a sweep, with the spread over its seeds"),
    "demo": ("demo", "all of it on the embedded digits: train a tokenizer, tokenize, fit, sample, evaluate"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    try:
        sys.exit(run(list(sys.argv[1:] if argv is None else argv)))
    except Exception:
        traceback.print_exc()
        sys.exit(BUG)


def run(argv: list[str]) -> int:
    """Run one command; its exit code."""
    show_log()
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"lightning-mvar {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return fail(f"there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    command = importlib.import_module(f"lightning_mvar.commands.{COMMANDS[argv[0]][0]}")
    try:
        command.main(argv)
    except InputError as error:
        return fail(plain(error))
    except argparse.ArgumentError as error:
        return fail(bad_arguments(argv, error))
    except Interrupted as stop:
        print(f"lightning-mvar: {stop}; {stop.remedy}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        return interrupted()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit(1)
            return interrupted()
        return int(stop.code or 0)
    return 0


def show_log() -> None:
    """Print what the package logs; Lightning's own messages have their own handler."""
    logger = logging.getLogger("lightning_mvar")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


def usage() -> str:
    lines = [f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightning-mvar COMMAND [options]",
            "",
            *lines,
            "",
            "`lightning-mvar COMMAND --help` lists the options.",
        ]
    )


def bad_arguments(argv: list[str], error: argparse.ArgumentError) -> str:
    """What the parser has to say in one line, with the configuration files that it may be about."""
    reason = " ".join(str(error).split())
    files = [value for option, value in pairwise(argv) if option in ("-c", "--config")]
    about = f" (config: {', '.join(files)})" if files else ""
    return f"{reason}{about}; `lightning-mvar {argv[0]} --help` lists the options"


def plain(error: InputError) -> str:
    """The message alone, where a data worker has wrapped it in its traceback."""
    return re.sub(r"^Caught \w+ in DataLoader worker.*\n[\w.]+Error: ", "", str(error), flags=re.DOTALL).strip()


def fail(message: str) -> int:
    print(f"lightning-mvar: error: {message}", file=sys.stderr)
    return 1


def interrupted() -> int:
    print("lightning-mvar: interrupted; what is finished is kept (fit goes on with --resume)", file=sys.stderr)
    return 130
