"""Short help, suggestions for misspelled names and shell completion, all without importing torch."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from lightning_mvar.cli.signatures import Option, Signature, command_signatures, signature
from lightning_mvar.errors import InputError, require_package

COMMANDS = {  # command: (module and its function, help)
    "new": ("new", "write configuration files of all commands for your own pictures"),
    "fit": ("fit", "train a network on token shards"),
    "validate": ("fit", "compute the teacher-forced loss of a checkpoint on the validation shards"),
    "test": ("fit", "compute the teacher-forced loss of a checkpoint on the test shards"),
    "train-tokenizer": ("train_tokenizer", "train the tokenizer on images"),
    "tokenize": ("tokenize", "turn images into token shards"),
    "shards": ("shards", "check, describe or view token shards"),
    "sample": ("sample", "draw images from a checkpoint or an exported folder"),
    "edit": ("edit", "inpaint part of an image"),
    "serve": ("serve", "start a local web page that draws and inpaints"),
    "evaluate": ("evaluate", "score samples of a checkpoint, or any other samples"),
    "doctor": ("doctor", "explain why two results of evaluate differ, or a result and a published score"),
    "sweep": ("sweep", "run fit and evaluate, or other commands, for each cell of a sweep file"),
    "likelihood": ("likelihood", "measure the bits per token of given images"),
    "train-scorer": ("train_scorer", "train the scorer that chooses among drafts when sampling"),
    "reconstruct": ("reconstruct", "compare real images with their reconstructions"),
    "export": ("export", "write a checkpoint as one self-contained folder"),
    "merge": ("merge", "write a linear combination of the weights of networks"),
    "bench": ("bench", "measure speed and memory on this machine"),
    "bench-gpu": ("bench_gpu", "run a fixed list of benchmarks on one GPU"),
    "report": ("report", "make tables and figures of a sweep, with the spread over seeds"),
    "configs": ("configs", "list or copy the configuration files that come with the package"),
    "demo": ("demo", "run everything on the embedded digits, from train-tokenizer to evaluate"),
}
POSITIONAL = {"doctor", "merge", "new", "report", "sweep"}  # commands whose required arguments are positional

FULL_HELP = "--help_all"  # jsonargparse's help: full texts, and the classes that options accept
PARSER_OPTIONS = {"help", "help_all", "config", "print_config", "print_completion"}  # added by jsonargparse
NAMES_WIDTH, MAX_WIDTH = 40, 120  # of the help, in characters
MAX_METAVAR = 20

FIRST_WORDS = {"ckpt_path": "MODEL", "folder": "FOLDER", "what": "WHAT"}  # options that may come first without a name
SAMPLING = "SamplingSettings"
GROUPS = ("required", "options", "sampling", "machine", "data", "model", "trainer")  # in the order of the help
# Options that concern the machine rather than the result.
MACHINE = ("device", "devices", "num_nodes", "precision", "graphs", "batch_size", "num_workers", "cache", "cache_dir")

LIT_MVAR = ("lightning_mvar.training.mvar", "LitMVAR")
TOKEN_DATA = ("lightning_mvar.training.datamodules", "TokenDataModule")
LIT_TOKENIZER = ("lightning_mvar.training.tokenizer", "LitTokenizer")
IMAGE_DATA = ("lightning_mvar.training.datamodules", "ImageDataModule")
TRAINER = ("lightning.pytorch.trainer.trainer", "Trainer")
TRAINING = {  # classes of `--model`, `--data` and `--trainer`
    "fit": (LIT_MVAR, TOKEN_DATA, TRAINER),
    "validate": (LIT_MVAR, TOKEN_DATA, TRAINER),
    "test": (LIT_MVAR, TOKEN_DATA, TRAINER),
    "train-tokenizer": (LIT_TOKENIZER, IMAGE_DATA, TRAINER),
}
START_HELP = {
    "resume": "continue from the newest complete checkpoint of this run; start from scratch if it has none",
    "overwrite": "remove the checkpoints and logs of an earlier run in the same folder, and start from scratch",
    "verify": "read the whole checkpoint and compare its checksums before continuing from it",
}
TF32_HELP = (
    "run float32 operations on GPUs in TF32, with a 10-bit mantissa: several times faster; scale inputs, samples and "
    "scores are always computed in float32"
)
TRAINING_OPTIONS = {  # type and help of the options outside any section
    "config": ("str", "YAML file with any of these options; may be repeated"),
    "ckpt_path": ("str", "checkpoint to continue from, or to score"),
    **{name: ("bool", text) for name, text in START_HELP.items()},
    "seed_everything": ("int | bool", "seed of weights, dropout and data"),
    "tf32": ("bool", TF32_HELP),
}
TRAINER_TEXTS = {  # help of the trainer's options that most runs set
    "max_steps": "total number of optimizer steps",
    "max_epochs": "total number of passes over the training data",
    "devices": "processes per machine, each with its own GPU",
    "num_nodes": "machines",
    "accelerator": "cpu, gpu or auto",
    "strategy": "ddp, fsdp2 or auto",
    "precision": "32-true, bf16-mixed, bf16-true or 16-mixed",
    "val_check_interval": "training batches between validations, or a fraction of an epoch",
    "limit_val_batches": "batches per validation, 0 for no validation",
    "log_every_n_steps": "steps between logged values",
    "callbacks": "checkpoints, samples and scores; overlays are in configs/callbacks",
    "logger": "TensorBoard, Weights & Biases, MLflow or CSV, one or several",
    "default_root_dir": "folder of the run",
}


def usage() -> str:
    """Returns the list of the commands."""
    lines = [f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightning-mvar COMMAND [options]",
            "",
            *lines,
            "",
            "`lightning-mvar COMMAND --help` lists the options.",
            "`lightning-mvar --print_completion bash` (or zsh, tcsh) prints a script that completes them.",
        ]
    )


@cache
def signatures_of(name: str) -> dict[str, Signature]:
    """Returns a command's signatures by the names of its subcommands, or by "" if it has none."""
    if name not in TRAINING:
        module = COMMANDS[name][0]
        return command_signatures(f"lightning_mvar.commands.{module}", module, name in POSITIONAL)
    model, data, trainer = (signature(*source) for source in TRAINING[name])
    run = [Option(option, kind, False, "", text, name) for option, (kind, text) in TRAINING_OPTIONS.items()]
    of_trainer = [replace(option, text=TRAINER_TEXTS.get(option.name, "")) for option in trainer.options]
    groups = {"data": data.options, "model": model.options, "trainer": of_trainer}
    options = [replace(o, name=f"{section}.{o.name}") for section, group in groups.items() for o in group]
    return {"": Signature(f"{COMMANDS[name][1].capitalize()}.", [*run, *options])}


def group_of(option: Option) -> str:
    """Returns the heading under which an option is listed."""
    if "." in option.name:
        return option.name.split(".")[0]
    if option.required:
        return "required"
    if option.owner == SAMPLING:
        return "sampling"
    return "machine" if option.name in MACHINE else "options"


def short_signature(name: str, found: Signature) -> Signature:
    """Returns a signature with only the options that the short help lists."""
    hidden = START_HELP.keys() if name in ("validate", "test") else set()
    shown = {f"trainer.{option}" for option in TRAINER_TEXTS}
    options = [o for o in found.options if o.name in shown or not (o.name in hidden or o.name.startswith("trainer."))]
    return found._replace(options=options)


def describe(parser: argparse.ArgumentParser, name: str, found: Signature) -> argparse.ArgumentParser:
    """Adds the options of a command to a parser, in groups and one line each; the parser does not check types."""
    width = help_width()
    first = first_option(name, found.options)
    needed = [o for o in found.options if o.required and o != first and "." not in o.name]
    words = [metavar(o) if o.positional else f"--{o.name} {metavar(o)}" for o in needed]
    if first is not None:
        words.insert(0, metavar(first) if first.required else f"[{metavar(first)}]")
    parser.usage = " ".join(["lightning-mvar", name, *words, "[options]"])
    parser.description = found.description
    parser.epilog = f"`lightning-mvar {name} {FULL_HELP}` lists all options, with their full descriptions."
    if name in TRAINING:
        parser.epilog += " `--print_schema` prints a JSON schema of its configuration files."
    column = min(max([len(f"  --{o.name} {metavar(o)}  ") for o in found.options], default=0), NAMES_WIDTH)
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=column, width=width)
    for title in GROUPS:
        group = parser.add_argument_group(title)
        for option in found.options:
            if group_of(option) == title:
                add_option(group, option, width - column)
    return parser


def add_option(group: argparse._ArgumentGroup, option: Option, width: int) -> None:
    """Adds an option whose description has at most `width` characters."""
    default = f" [{option.default}]" if option.default not in ("", "false") else ""
    text = first_clause(option.text)
    if option.choices and option.choices[0] not in metavar(option):
        text = f"{text}: {', '.join(option.choices)}"
    text = textwrap.shorten(text, max(width - len(default) - 1, 8), placeholder=" ...") + default
    keywords: dict[str, Any] = {"help": text.replace("%", "%%")}
    if option.kind == "bool" and option.default != "true":
        keywords["action"] = "store_true"
    else:
        keywords |= {"metavar": metavar(option), "choices": choices_of(option) or None}
    group.add_argument(option.name if option.positional else f"--{option.name}", **keywords)


def first_clause(text: str) -> str:
    return re.split(r"(?<=[\w)`])[;:.](?:\s|$)", text)[0]  # only punctuation at the end of a word


def help_width() -> int:
    return min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)


def choices_of(option: Option) -> list[str]:
    return ["true", "false"] if option.kind == "bool" else option.choices


def metavar(option: Option) -> str:
    """Returns the placeholder of a value: its choices if they are short, its type if it is a number, or its name."""
    if option.name in FIRST_WORDS and option.owner not in TRAINING:
        return FIRST_WORDS[option.name]
    choices = "{" + ",".join(choices_of(option)) + "}"
    if 2 < len(choices) <= MAX_METAVAR:
        return choices
    types = set(re.findall(r"\w+", option.kind)) - {"None", "Optional", "tuple", "bool"}
    word = types.pop() if types in ({"int"}, {"float"}) else re.split(r"[._]", option.name)[-1]
    return word.upper() + (" ..." if option.kind.startswith("tuple[") else "")


def print_help(name: str, *words: str) -> None:
    """Prints the options of a command, or of the subcommand that is the first of `words`."""
    signatures = signatures_of(name)
    subcommand = words[0] if words and words[0] in signatures else ""
    if found := signatures.get(subcommand):
        parser, full_name = argparse.ArgumentParser(add_help=False), f"{name} {subcommand}".strip()
        print(describe(parser, full_name, short_signature(name, found)).format_help(), end="")
        return
    print(f"usage: lightning-mvar {name} {{{','.join(signatures)}}} DIR [options]\n")
    width = max(len(f"  {name} {other} DIR  ") for other in signatures)
    for other, found in signatures.items():
        text = textwrap.shorten(first_clause(found.description), help_width() - width, placeholder=" ...")
        print(f"  {name} {other} DIR".ljust(width) + text)
    print(f"\n`lightning-mvar {name} {other} --help` lists the options.")


def first_option(command: str, options: Iterable[Option]) -> Option | None:
    """Returns the option whose value a command also takes as its first word; None if there is none."""
    named = [option for option in options if option.name in FIRST_WORDS and not option.positional]
    return None if command in TRAINING or not named else named[0]


def with_first_option(argv: list[str]) -> list[str]:
    """Inserts the option before a value that comes first: `sample var-d16` becomes `sample --ckpt_path var-d16`.

    Raises:
        InputError: if the option is also given by its name.
    """
    signatures = {} if argv[0] in TRAINING else signatures_of(argv[0])
    begin = 2 if argv[1:] and argv[1] in signatures else 1
    found, words = signatures.get(" ".join(argv[1:begin])), argv[begin:]
    first = first_option(argv[0], found.options) if found else None
    if first is None or not words or words[0].startswith("-"):
        return argv
    option = f"--{first.name}"
    if twice := [word for word in words if word.partition("=")[0] == option]:
        raise InputError(f"{words[0]} already sets {option} of {argv[0]}: drop {twice[0]} or {words[0]}")
    return [*argv[:begin], option, *words]


def nearest(name: str, names: Iterable[str], otherwise: str) -> str:
    """Returns "did you mean X?" with the closest of `names`, or `otherwise` if none is close."""
    matches = difflib.get_close_matches(name, names, 1)
    return f"did you mean {matches[0]}?" if matches else otherwise


def completion(shell: str) -> str:
    """Returns a script that completes commands, options and their choices in bash, zsh or tcsh.

    Raises:
        InputError: if shtab is not installed or does not know the shell.
    """
    require_package("shtab", "completion", "completion")
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise InputError(f"no completion for the shell {shell!r}; use one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser = argparse.ArgumentParser("lightning-mvar", add_help=False)
    subparsers = parser.add_subparsers()
    for name, (_, text) in COMMANDS.items():
        command, signatures = subparsers.add_parser(name, help=text, add_help=False), signatures_of(name)
        if found := signatures.get(""):
            options = [option for section in found.options for option in section.with_fields()]
            describe(command, name, found._replace(options=options))
            continue
        others = command.add_subparsers()
        for subcommand, found in signatures.items():
            describe(others.add_parser(subcommand, add_help=False), f"{name} {subcommand}", found)
    return str(shtab.complete(parser, shell))
