"""Self-contained folders of a tokenizer, or of a network with its tokenizer: `config.json` and safetensors.

A folder holds `config.json`, `tokenizer.safetensors` and, with a network, `network.safetensors`. `config.json` is
written last, so a folder that has one is complete. Modules are built on the meta device and the loaded tensors are
assigned to them, so memory holds the weights once (and, temporarily, the mapped pages of the file).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_mvar.checkpoints.pair import TrainedModel, check_pair
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.tensors import StateDict, load_strictly, read_weights, save_weights
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig

Config = TypeVar("Config", MVARConfig, TokenizerConfig)


def save_folder(
    folder: str | Path,
    tokenizer: Tokenizer,
    network: MVAR | None = None,
    class_names: list[str] | None = None,
) -> None:
    """Writes a tokenizer, or a network with its tokenizer, as one self-contained folder."""
    folder = Path(folder)
    require_folder(folder)
    try:
        (folder / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror})") from error
    config: dict[str, Any] = {"format_version": 1, "tokenizer": asdict(tokenizer.config)}
    save_weights(tokenizer, folder / "tokenizer.safetensors")
    if network is not None:
        config |= {"network": asdict(network.config), "class_names": class_names or []}
        save_weights(network, folder / "network.safetensors")
    with atomic_path(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def require_folder(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{folder} is a file; name a folder to write to")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer of a folder that `train-tokenizer` or `export` wrote, in eval mode."""
    config = read_config(Path(folder), "tokenizer", "train one with `lightning-mvar train-tokenizer`")
    with torch.device("meta"):
        tokenizer = Tokenizer(config_from_dict(TokenizerConfig, config["tokenizer"], folder))
    return load_strictly(tokenizer, read_weights(Path(folder) / "tokenizer.safetensors"), folder)


def load_folder(folder: Path, tokenizer: str | Path | None = None) -> TrainedModel:
    """Loads an exported folder.

    Args:
        folder: a folder that `export` wrote.
        tokenizer: folder of another tokenizer to use with the network.

    Raises:
        InputError: if a file is missing or damaged, or the tokenizer does not fit the network.
    """
    config = read_config(folder, "network", "write one with `lightning-mvar export`")
    network = build_network(config["network"], read_weights(folder / "network.safetensors"), folder)
    loaded = load_tokenizer(tokenizer or folder)
    check_pair(network.config, loaded.config, f"the tokenizer in {tokenizer or folder}")
    return TrainedModel(network, loaded, config["class_names"])


def build_network(config: dict[str, Any], weights: StateDict, source: Path) -> MVAR:
    with torch.device("meta"):
        network = MVAR(config_from_dict(MVARConfig, config, source))
    return load_strictly(network, weights, source)


def config_from_dict(cls: type[Config], values: dict[str, Any], source: str | Path) -> Config:
    """Builds a config from its `asdict` form; `source` names the file in messages."""
    try:
        return cls(**(values | {"schedule": ScaleSchedule(**values["schedule"])}))
    except (TypeError, KeyError) as error:
        raise InputError(f"{source} does not describe a {cls.__name__} of this version ({error})") from error


def read_config(folder: Path, part: str, remedy: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: not a finished {part} folder; {remedy}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if part not in config:
        raise InputError(f"{path} describes no {part}; {remedy}")
    return config
