"""Weights in and out: our folder (safetensors + config.json), training checkpoints, and the published files.

A folder holds `config.json` and `network.safetensors`, `tokenizer.safetensors` or both. `config.json` is written last,
so a folder that has one is complete. Networks are built on the meta device and given their weights, so that memory
holds them once (and, for a while, the mapped pages of the file).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.official import M_VAR, read_network, read_tokenizer, write_network, write_tokenizer
from lightning_mvar.resume import PLAIN_PART, read_part, read_plain_part
from lightning_mvar.sampling import check_pair
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from lightning_mvar.weights import StateDict, load_strictly, read_torch, read_weights, save_torch, save_weights

Config = TypeVar("Config", MVARConfig, TokenizerConfig)

CHECKPOINT_KEY = "lightning_mvar"  # where a training checkpoint keeps what is needed to rebuild its network
NETWORK_PREFIX, EMA_PREFIX = "network.", "ema."

WhichWeights = Literal["ema", "raw"]


class TrainedModel(NamedTuple):
    """All that sampling takes: both parts in eval mode on the CPU, and the names of the classes."""

    network: MVAR
    tokenizer: Tokenizer
    class_names: list[str]


def save_folder(
    folder: str | Path,
    tokenizer: Tokenizer,
    network: MVAR | None = None,
    class_names: list[str] | None = None,
) -> None:
    """Write a tokenizer, or a network with its tokenizer, as one self-contained folder."""
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
    """The tokenizer of a folder that `train-tokenizer` or `export` wrote, in eval mode."""
    config = read_config(Path(folder), "tokenizer", "train one with `lightning-mvar train-tokenizer`")
    with torch.device("meta"):
        tokenizer = Tokenizer(config_from_dict(TokenizerConfig, config["tokenizer"], folder))
    return load_strictly(tokenizer, read_weights(Path(folder) / "tokenizer.safetensors"), folder)


def load_trained(path: str | Path, tokenizer: str | Path | None = None, weights: WhichWeights = "ema") -> TrainedModel:
    """What `sample` and `evaluate` take: a training checkpoint, or a folder that `export` wrote.

    Args:
        path: a file; a folder of a sharded checkpoint, of which only weights are read; or a folder of `export`.
        tokenizer: folder of the tokenizer, where it is no longer at the path that the checkpoint remembers.
        weights: of a checkpoint, `ema` for those averaged over training where it has them, `raw` for the last.

    Raises:
        InputError: if the file is missing or not ours, or its tokenizer is missing or another one.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; it must be a checkpoint file or a folder that `export` wrote")
    if path.is_dir() and not (path / PLAIN_PART).is_file():
        config = read_config(path, "network", "write one with `lightning-mvar export`")
        network = build_network(config["network"], read_weights(path / "network.safetensors"), path)
        loaded = load_tokenizer(tokenizer or path)
        check_pair(network.config, loaded.config, f"the tokenizer in {tokenizer or path}")
        return TrainedModel(network, loaded, config["class_names"])
    checkpoint = read_plain_part(path)
    if CHECKPOINT_KEY not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of `lightning-mvar fit`")
    about = checkpoint[CHECKPOINT_KEY]
    prefix = EMA_PREFIX if weights == "ema" and about["run"]["ema"] else NETWORK_PREFIX
    network = build_network(about["network"], read_part(path, prefix), path)
    loaded = load_tokenizer(tokenizer or about["tokenizer"]["path"])
    if (fingerprint := loaded.fingerprint()) != about["tokenizer"]["fingerprint"]:
        raise InputError(
            f"{path} was trained with tokenizer {about['tokenizer']['fingerprint']}, but "
            f"{tokenizer or about['tokenizer']['path']} holds {fingerprint}: name the right one with --tokenizer"
        )
    return TrainedModel(network, loaded, about["class_names"])


def build_network(config: dict[str, Any], weights: StateDict, source: Path) -> MVAR:
    with torch.device("meta"):
        network = MVAR(config_from_dict(MVARConfig, config, source))
    return load_strictly(network, weights, source)


def describe(network: MVARConfig, tokenizer: str, fingerprint: str, class_names: list[str]) -> dict[str, Any]:
    """What a training checkpoint stores under `CHECKPOINT_KEY`, for `load_trained`; plain types only."""
    return {
        "network": asdict(network),
        "tokenizer": {"path": tokenizer, "fingerprint": fingerprint},
        "class_names": class_names,
    }


def config_from_dict(cls: type[Config], values: dict[str, Any], source: str | Path) -> Config:
    """A config from what `asdict` made of it."""
    try:
        return cls(**(values | {"schedule": ScaleSchedule(**values["schedule"])}))
    except (TypeError, KeyError) as error:
        raise InputError(f"{source}: not a {cls.__name__} of this version ({error})") from error


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


def save_official(folder: str | Path, model: TrainedModel) -> list[Path]:
    """Write network and tokenizer as the published code reads them; the two files, named as it names them.

    Raises:
        InputError: if the published code has no such network or tokenizer.
    """
    network, tokenizer = model.network.config, model.tokenizer.config
    kind = "mvar" if network.mixers == M_VAR else "var"
    files = {
        f"{kind}_d{network.depth}.pth": write_network(model.network),
        f"vae_ch{tokenizer.channels}v{tokenizer.vocab_size}z{tokenizer.code_dim}.pth": write_tokenizer(model.tokenizer),
    }
    require_folder(Path(folder))
    for name, state in files.items():
        save_torch(state, Path(folder) / name)
    return [Path(folder) / name for name in files]


def load_official_mvar(source: str | Path | Mapping[str, Tensor]) -> MVAR:
    """A published VAR or M-VAR network, in eval mode; its configuration is read off keys and shapes.

    Args:
        source: a .pth or .safetensors file, or a state dict with the published keys.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of a published network.
    """
    return read_network(*official_state(source, "network"))


def load_official_tokenizer(source: str | Path | Mapping[str, Tensor], schedule: ScaleSchedule) -> Tokenizer:
    """The published tokenizer, in eval mode; its configuration is read off shapes, except the schedule.

    Args:
        source: a .pth or .safetensors file, or a state dict with the published keys.
        schedule: the scales to use it with; the weights do not tell.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of the published tokenizer.
    """
    state, name = official_state(source, "tokenizer")
    return read_tokenizer(state, schedule, name)


def load_official(network: str | Path, tokenizer: str | Path | None = None) -> TrainedModel:
    """A published network with its tokenizer, whose classes have no names.

    Args:
        network: a .pth or .safetensors file, perhaps a training checkpoint that holds the tokenizer too.
        tokenizer: a published file, or a folder of ours; the one in `network` where not given.

    Raises:
        InputError: if a file cannot be read or is something else, or the two do not belong together.
    """
    model = load_official_mvar(network)
    if tokenizer is None:
        try:
            loaded = load_official_tokenizer(network, model.config.schedule)
        except InputError as error:
            raise InputError(f"{error}; name the tokenizer's own file with --tokenizer") from error
    elif Path(tokenizer).is_dir():
        loaded = load_tokenizer(tokenizer)
    else:
        loaded = load_official_tokenizer(tokenizer, model.config.schedule)
    check_pair(model.config, loaded.config, f"the tokenizer in {tokenizer or network}")
    return TrainedModel(model, loaded, [])


def official_state(source: str | Path | Mapping[str, Tensor], part: str) -> tuple[StateDict, str]:
    """A flat state dict and a name for messages, from a file or a dictionary in memory.

    The published trainers save a dictionary that holds the parts under `trainer`; compiled or wrapped modules prefix
    their keys.
    """
    name, state = f"the {part} state dict", cast(Any, source)
    if isinstance(source, str | Path):
        name, path = str(source), Path(source)
        state = read_weights(path) if path.suffix == ".safetensors" else read_torch(path)
    if isinstance(state.get("trainer"), Mapping):
        state = state["trainer"]
    inside = {"network": ("mvar_wo_ddp", "var_wo_ddp"), "tokenizer": ("vae_local",)}[part]
    state = next((state[key] for key in inside if key in state), state)
    if not isinstance(state, Mapping) or not all(
        isinstance(t, Tensor) and isinstance(k, str) for k, t in state.items()
    ):
        raise InputError(f"{name} is not a state dict of a published {part}")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): tensor for key, tensor in state.items()}, name
