"""Checks of a command's inputs before torch is imported: paths that do not exist, and misspelled classes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import yaml

from lightning_mvar.cli.checks import NULLS, config_files, only_prints, read_config_file
from lightning_mvar.data.classes import Classes, imagenet_classes, select_classes
from lightning_mvar.errors import InputError
from lightning_mvar.io.configs import find_config
from lightning_mvar.io.hub import NETWORK_KINDS, NETWORKS, TOKENIZER_KINDS, name_on_hub
from lightning_mvar.io.json_files import checked

SOURCE_KINDS = "a folder, .tar or .parquet files, or a built-in set such as digits:train"
SHARDS = "a folder that `tokenize` wrote"
OWN_SHARDS = "a folder that `sample --tokens` wrote"
REFERENCE_KINDS = f"{SOURCE_KINDS}, token shards, an .npz, or imagenet256 (64, 128, 512), which is downloaded"
IMAGE = "an image file"
RUN_INPUTS = {
    "ckpt_path": "a checkpoint of `fit`",
    "model.tokenizer": TOKENIZER_KINDS,
    "model.weights": NETWORK_KINDS,
}
EXPECTED = {  # what an option must name
    "ckpt_path": NETWORK_KINDS,
    "tokenizer": TOKENIZER_KINDS,
    "reconstructions": TOKENIZER_KINDS,
    "images": SOURCE_KINDS,
    "draft_scorer": "a folder that `train-scorer` wrote",
    "guidance_network": NETWORK_KINDS,
}
EXPECTED_BY_COMMAND = {
    "fit": RUN_INPUTS | {"data.train": SHARDS, "data.val": SHARDS},
    "validate": RUN_INPUTS,
    "test": RUN_INPUTS,
    "train-tokenizer": {
        "ckpt_path": "a checkpoint of `train-tokenizer`",
        "data.train": SOURCE_KINDS,
        "data.val": SOURCE_KINDS,
    },
    "train-scorer": {"real": SHARDS, "own": OWN_SHARDS, "val": SHARDS, "own_val": OWN_SHARDS},
    "evaluate": {"samples": "images that `sample` wrote", "reference": REFERENCE_KINDS, "floor": REFERENCE_KINDS},
    "export": {"official": NETWORK_KINDS},
    "merge": {"base": NETWORK_KINDS},
    "edit": {"image": IMAGE, "mask": IMAGE},
    "shards": {"folder": "a folder that `tokenize` or `sample --tokens` wrote"},
}
EXPECTED_WORDS = {"merge": NETWORK_KINDS, "report": "the folder of a sweep", "sweep": "a sweep file"}
# Options, missing values, URLs, splits, patterns, and names of ADM's references.
NOT_A_PATH = re.compile(rf"^(-.*|{'|'.join(NULLS)}|imagenet\d+|)$|[:*?{{\[]")
RANK_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID")  # set in ranks by Lightning, torchrun and Slurm


class Given(NamedTuple):
    """Value of an option, its place in a configuration file (`FILE, line 3: `), and the folder of that file.

    Place and folder are empty for values from the command line.
    """

    value: str
    source: str = ""
    folder: str = ""


NOTHING = Given("")


def check_inputs(name: str, *words: str) -> None:
    """Checks the paths and --classes on a command line and in its configuration files.

    Skips names on the Hub, patterns, classes of training checkpoints, and inputs that a checkpoint makes unnecessary:
    the initial weights of a run, and existing samples. Ranks of a multi-process run skip all checks, because they
    report errors together later.

    Raises:
        InputError: if a network, a tokenizer or images do not exist, or a network has no such class.
    """
    if only_prints(words) or any(name in os.environ for name in RANK_VARIABLES):
        return
    expected = EXPECTED | EXPECTED_BY_COMMAND.get(name, {})
    given = options_given(words, {*expected, "classes", "resume"})
    if continues(given):
        for unneeded in ("model.weights", "samples"):  # `evaluate` draws the samples from a checkpoint
            given.pop(unneeded, None)
    if name in EXPECTED_WORDS:
        for word in takewhile(lambda word: not word.startswith("-"), words):
            require_existing("", Given(find_config(word)), EXPECTED_WORDS[name])
    for option, kinds in expected.items():
        require_existing(f"--{option} ", given.get(option, NOTHING), kinds)
    check_classes(given.get("classes", NOTHING), given.get("ckpt_path", NOTHING).value)


def require_existing(label: str, given: Given, kinds: str) -> None:
    """Raises InputError if a path does not exist and is not a name on the Hub where one is allowed."""
    place, source, folder = given
    if is_missing(place) and (kinds not in (NETWORK_KINDS, TOKENIZER_KINDS) or name_on_hub(place) is None):
        is_beside = folder != "" and not is_missing(os.path.join(folder, place))
        remedy = f"it exists in {folder}: run the command there" if is_beside else f"it must be {kinds}"
        raise InputError(f"{source}{label}{place:.200} does not exist; {remedy}")


def check_classes(chosen: Given, network: str) -> None:
    """Raises InputError if the classes of the network are known and the chosen ones are not among them."""
    if chosen.value in ("", *NULLS) or (classes := classes_of(network)) is None:
        return
    try:
        select_classes(chosen.value, classes)
    except InputError as error:
        raise InputError(f"{chosen.source}{error}") from error


def continues(given: Mapping[str, Given]) -> bool:
    """Returns whether a run continues from a checkpoint."""
    resume = given.get("resume")  # a flag on the command line, true or false in a file
    return given.get("ckpt_path", NOTHING).value not in ("", *NULLS) or (resume is not None and resume.value != "false")


def options_given(words: Sequence[str], names: Collection[str]) -> dict[str, Given]:
    """Returns the last value of each named option, on the command line or in a configuration file.

    The value of a section, such as `--model '{weights: null}'`, replaces the values of its options.
    """
    options: dict[str, Given] = {}
    for option, value in all_options(words):
        options = {name: earlier for name, earlier in options.items() if not name.startswith(f"{option}.")}
        if option in names:
            options[option] = value
    return options


def all_options(words: Sequence[str]) -> Iterator[tuple[str, Given]]:
    """Yields the options of a command line and its configuration files in order."""
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option in ("-c", "--config"):
            for file in config_files(["--config", value]):
                yield from plain_values(read_config_file(file), str(file))
        elif option.startswith("--"):
            yield option[2:], Given(value)


def plain_values(node: yaml.Node | None, file: str, prefix: str = "") -> Iterator[tuple[str, Given]]:
    """Yields the dotted names and values of a file's scalar options."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.ScalarNode):
            source = f"{file}, line {key.start_mark.line + 1}: "
            yield f"{prefix}{key.value}", Given(value.value, source, os.path.dirname(file))
        yield from plain_values(value, file, f"{prefix}{key.value}.")


def is_missing(place: str) -> bool:
    """Returns whether a value is a plain path at which nothing exists, not even a broken link.

    Raises:
        OSError: if it cannot be examined.
    """
    if NOT_A_PATH.search(place):
        return False
    try:
        os.lstat(os.path.expanduser(place))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError for a NUL character
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
        return None  # the command reports why
    return Classes(names, count) if count in (len(names), len(imagenet)) else None
