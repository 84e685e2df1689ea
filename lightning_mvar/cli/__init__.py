"""Command line: `lightning-mvar COMMAND ...`, the same as `python -m lightning_mvar COMMAND ...`.

Exit codes: 0 success; 1 user error or bad data, reported in one message without a traceback; 130 interrupted by Ctrl-C,
143 by SIGTERM, 138 by SIGUSR1; 141, without a message, if the reader of a pipe has exited (`| head`); anything else is
a bug and prints its traceback.
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import inspect
import io
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from lightning_mvar import __version__
from lightning_mvar.cli.help import (
    COMMANDS,
    FULL_HELP,
    TRAINING,
    completion,
    nearest,
    print_help,
    usage,
    with_first_option,
)
from lightning_mvar.errors import InputError, Interrupted, one_line

PIPE_EXIT_CODE = 128 + signal.SIGPIPE
BUG_EXIT_CODE = 70  # of any exception that is not an InputError
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of writes outside `atomic_path`: never a bug
# jsonargparse's messages, shortened because they list every type that an option accepts.
UNKNOWN_CLASS = re.compile(
    r"key \"([\w.]+)\":.*(?:Expected a dot import path string: |: module '[\w.]+' has no attribute ')(\w+)"
)
REFUSED_BY_CLASS = re.compile(
    r"key \"([\w.]+)\":.*Problem with given class_path '([\w.]+)': (.*?)(?= - Expected| - Not a valid subclass|$)"
)
UNACCEPTED_ARGUMENT = re.compile(r"Option '([\w.]+)' is not accepted")
SILENCED_LOGS = (
    *("Tip: For seamless cloud", "TPU available: False", "Restoring states from"),  # from Lightning
    *("thrown while requesting", "Retrying in"),  # from huggingface_hub, whose last failure is reported
)
SPIN_COUNT = "3000"  # iterations of a waiting thread's loop; the default is 300,000 (docs/performance.md)
ACCESS_ERRORS = (errno.EACCES, errno.EPERM, errno.ELOOP)  # of a path that the user gave


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code."""
    prepare_streams()
    limit_spinning()
    bug = None
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        code = PIPE_EXIT_CODE
    except Exception as error:
        code, bug = BUG_EXIT_CODE, error
    code = flush_streams(code)
    if code == BUG_EXIT_CODE:
        traceback.print_exception(bug)
    gc.freeze()  # otherwise the last garbage collection scans all objects of torch and Lightning, for seconds
    sys.exit(code)


def prepare_streams() -> None:
    """Makes the standard streams accept any text: escapes what they cannot encode, and reopens closed ones."""
    for name in ("stdin", "stdout", "stderr"):  # in order of their descriptors: `open` takes the lowest free one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 (stays open)
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def limit_spinning() -> None:
    """Limits how long idle threads of GNU OpenMP, which torch loads on Linux, spin, unless the user has set a limit.

    By default they spin for long. On busy cores they take time from the thread that they wait for, and a training step
    can take several times as long. On two idle cores the limit makes no difference.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def flush_streams(code: int) -> int:
    """Flushes the output streams; returns `code`, or another exit code if that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # otherwise Python flushes again and complains
            if isinstance(error, BrokenPipeError):
                return PIPE_EXIT_CODE
            code = fail(f"cannot write to {stream.name} ({error.strerror})")
    return code


def run(argv: list[str]) -> int:
    """Runs one command and returns its exit code."""
    enable_logging()
    try:
        if (code := answer_without_command(argv)) is not None:
            return code
        argv = with_first_option(argv)
        from lightning_mvar.cli.checks import check_options  # here, because --version and --help need no YAML
        from lightning_mvar.cli.inputs import check_inputs

        check_options(*argv)
        check_inputs(*argv)
        argv = ["--help" if argument == FULL_HELP else argument for argument in argv]
        run_command(argv)
    except InputError as error:
        # A DataLoader worker puts a traceback before the message.
        worker = r"^Caught \w+ in DataLoader worker.*\n[\w.]+Error: "
        return fail(re.sub(worker, "", str(error), flags=re.DOTALL).strip())
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return fail(f"the path {str(error.filename)[:40]}... is too long for a file system")
        if error.errno in ACCESS_ERRORS and error.filename is not None:
            return fail(f"cannot access {error.filename} ({error.strerror})")
        if error.errno not in DISK_ERRORS:
            raise
        return fail(
            f"cannot write {error.filename or 'the output'} ({error.strerror}): free some space or use another disk"
        )
    except argparse.ArgumentError as error:
        return fail(describe_argument_error(argv, error))
    except Interrupted as stop:
        print(f"lightning-mvar: {stop}; {stop.remedy}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        return report_interruption()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit(1)
            return report_interruption()
        return int(stop.code or 0)
    return 0


def run_command(argv: list[str]) -> None:
    """Imports the module of a command and runs its `main` (training) or the function with the module's name."""
    name = COMMANDS[argv[0]][0]
    module = importlib.import_module(f"lightning_mvar.commands.{name}")
    from lightning_mvar.cli.arguments import call  # here, because --version and --help need no jsonargparse

    if "torch" in sys.modules:  # some commands, such as `configs`, do not need it
        from lightning_mvar.devices import set_tf32

        set_tf32(False)
    if argv[0] in TRAINING:
        module.main(argv)
    else:
        call(vars(module)[name], argv)


def answer_without_command(argv: list[str]) -> int | None:
    """Handles command lines that run no command: help, version, completion, schema and misspelled names.

    Returns:
        Exit code; None if there is a command to run.
    """
    if not argv or argv[0] in ("-h", "--help", FULL_HELP):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"lightning-mvar {__version__}")
        return 0
    for argument in argv:
        if re.search("[\ud800-\udfff]", argument):  # how Python represents bytes that are not UTF-8
            return fail(f"argument {argument!a} is not valid UTF-8: rename the file, or link it under another name")
    option, _, shell = argv[0].partition("=")
    if option == "--print_completion":
        print(completion(shell or " ".join(argv[1:])))
        return 0
    if argv[0] not in COMMANDS:
        listed = f"the commands are {', '.join(COMMANDS)}"
        return fail(f"unknown command {argv[0]!r}; {nearest(argv[0], COMMANDS, otherwise=listed)}")
    if {"-h", "--help"} & set(argv[1:]):
        print_help(*argv)
        return 0
    if "--print_schema" in argv and argv[0] in TRAINING:
        from lightning_mvar.cli.schema import config_schema

        print(json.dumps(config_schema(argv[0]), indent=1))
        return 0
    return None


def enable_logging() -> None:
    """Prints the package's log messages to stderr, and drops `SILENCED_LOGS` from those of other packages."""
    logger = logging.getLogger("lightning_mvar")
    logger.handlers = [logging.StreamHandler()]  # replaced, because stderr may have changed since the last command
    logger.setLevel(logging.INFO)
    for name in ("lightning.pytorch.utilities.rank_zero", "huggingface_hub.utils._http"):
        logging.getLogger(name).addFilter(is_shown)


def is_shown(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in SILENCED_LOGS)


def describe_argument_error(argv: list[str], error: argparse.ArgumentError) -> str:
    """Returns the parser's message as one line that also names the configuration files."""
    from lightning_mvar.io.configs import config_words  # here, because --version and --help need no YAML

    reason = one_line(error)
    configs = [name for *_, name in config_words(argv)]
    source = f" (config: {', '.join(configs)})" if configs else ""
    if unknown := UNKNOWN_CLASS.search(reason):
        option, name = unknown.groups()
        otherwise = "give the import path of a class, package.module.NAME"
        return f"--{option} {name}{source}: no such class; {nearest(name, loaded_classes(), otherwise)}"
    remedy = f"`lightning-mvar {argv[0]} --help` lists the options"
    if refused := REFUSED_BY_CLASS.search(reason):
        option, path, reason = refused.groups()
        module, _, name = path.rpartition(".")
        if unaccepted := UNACCEPTED_ARGUMENT.match(reason):
            arguments = inspect.signature(getattr(sys.modules[module], name)).parameters
            remedy = nearest(unaccepted[1], arguments, otherwise=remedy)
        reason = f"--{option} {name}: {reason}"
    return f"{reason}{source}; {remedy}"


def loaded_classes() -> set[str]:
    """Returns the names of the classes that options accept without a module."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("lightning_mvar.", "lightning."))]
    return {name for module in modules for name, value in vars(module).items() if isinstance(value, type)}


def fail(message: str) -> int:
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    print(f"lightning-mvar: error: {escaped}", file=sys.stderr)  # names from files may hold control characters
    return 1


def report_interruption() -> int:
    remedy = "run the same command again; train-tokenizer and fit continue with --resume"
    print(f"lightning-mvar: interrupted: {remedy}", file=sys.stderr)
    return 130
