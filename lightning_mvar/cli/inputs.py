"""Checks of what a command reads, before torch is imported: paths that do not exist, and misspelt classes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_mvar.cli.checks import asks_for_text, config_files, read_config_file
from lightning_mvar.data.classes import Classes, imagenet_classes, select_classes
from lightning_mvar.errors import InputError
from lightning_mvar.io.hub import A_NETWORK, A_TOKENIZER, NETWORKS, name_on_hub
from lightning_mvar.io.json_files import checked

A_SOURCE = "a folder, .tar or .parquet files, or a built-in set such as digits:train"
READ = {  # what the value of an option must be
    "ckpt_path": A_NETWORK,
    "tokenizer": A_TOKENIZER,
    "reconstructions": A_TOKENIZER,
    "images": A_SOURCE,
}
A_TRAINED_NETWORK = {"ckpt_path": "a checkpoint of `fit`", "model.tokenizer": A_TOKENIZER}
SHARDS = "a folder that `tokenize` wrote"
READ_BY = {  # likewise, of one command
    "fit": A_TRAINED_NETWORK | {"data.train": SHARDS, "data.val": SHARDS},
    "validate": A_TRAINED_NETWORK,
    "test": A_TRAINED_NETWORK,
    "train-tokenizer": {"ckpt_path": "a checkpoint of `train-tokenizer`", "data.train": A_SOURCE, "data.val": A_SOURCE},
}
NO_PATH = re.compile(r"^(-.*|null|Null|NULL|~|)$|[:*?{\[]")  # other options, no value, addresses, splits and patterns
RANKS = ("LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID")  # set by Lightning, torchrun and Slurm for one of several ranks


def check_inputs(name: str, *words: str) -> None:
    """Checks the paths that a command line and its configuration files name, and --classes.

    What it cannot tell is left to the command: names on the Hub, patterns, and the classes of a training checkpoint. So
    are the mistakes of several ranks, which report them together.

    Raises:
        InputError: if a network, a tokenizer or images do not exist, or a network has no such class.
    """
    if asks_for_text(words) or any(name in os.environ for name in RANKS):
        return
    values = dict(options_given(words))
    for option, wanted in (READ | READ_BY.get(name, {})).items():
        value = values.get(option, "")
        if is_missing(value) and (wanted not in (A_NETWORK, A_TOKENIZER) or name_on_hub(value) is None):
            raise InputError(f"--{option} {value:.200} does not exist; it must be {wanted}")
    chosen, model = values.get("classes"), values.get("ckpt_path")
    if chosen and model and (classes := classes_of(model)) is not None:
        select_classes(chosen, classes)


def options_given(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields names and values of options in their order, those of configuration files included."""
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option in ("-c", "--config"):
            for file in config_files(["--config", value]):
                yield from plain_values(read_config_file(file))
        elif option.startswith("--"):
            yield option[2:], value


def plain_values(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted names and values of a file's plain values."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.ScalarNode):
            yield f"{prefix}{key.value}", value.value
        yield from plain_values(value, f"{prefix}{key.value}.")


def is_missing(place: str) -> bool:
    """Returns whether a place is a plain path where nothing is, not even a broken link.

    Raises:
        OSError: if it cannot be examined.
    """
    if NO_PATH.search(place):
        return False
    try:
        os.lstat(os.path.expanduser(place))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a NUL
        return True
    return False


def classes_of(place: str) -> Classes | None:
    """Returns the classes of a known network or an exported folder; None for others."""
    imagenet = list(imagenet_classes())
    if place in NETWORKS:
        return Classes(imagenet, len(imagenet))
    try:
        values = json.loads((Path(place).expanduser() / "config.json").read_bytes())
        names, count = checked(values["class_names"], list[str], place), values["network"]["num_classes"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # the command says why
    return Classes(names, count) if count in (len(names), len(imagenet)) else None
