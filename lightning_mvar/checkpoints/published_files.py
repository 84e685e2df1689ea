"""Loads published VAR and M-VAR networks with their tokenizers, and writes networks in the published format."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_mvar.checkpoints.folders import load_tokenizer, require_folder
from lightning_mvar.checkpoints.pair import TrainedModel, check_pair
from lightning_mvar.checkpoints.published import (
    M_VAR,
    network_from_published,
    network_to_published,
    refuse_unsupported,
    tokenizer_to_published,
    unsupported_network,
    unsupported_tokenizer,
)
from lightning_mvar.checkpoints.state_dicts import load_official_tokenizer, read_published_state
from lightning_mvar.checkpoints.stored import StoredModel
from lightning_mvar.errors import InputError
from lightning_mvar.io.hub import TOKENIZERS
from lightning_mvar.io.tensors import load_strictly, save_torch
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer


def save_official(folder: str | Path, model: TrainedModel) -> list[Path]:
    """Writes network and tokenizer in the published format and returns the two files, named as the published ones.

    Raises:
        InputError: if the published code does not support such a network or tokenizer.
    """
    network, tokenizer = model.network.config, model.tokenizer.config
    refuse_unsupported([*unsupported_network(network), *unsupported_tokenizer(tokenizer)])
    kind = "mvar" if network.mixers == M_VAR else "var"
    files = {
        f"{kind}_d{network.depth}.pth": network_to_published(model.network),
        f"vae_ch{tokenizer.channels}v{tokenizer.vocab_size}z{tokenizer.code_dim}.pth": tokenizer_to_published(
            model.tokenizer
        ),
    }
    folder = Path(folder).expanduser()
    require_folder(folder)
    for name, state in files.items():
        save_torch(state, folder / name)
    return [folder / name for name in files]


def load_official_mvar(source: str | Path | Mapping[str, Tensor], schedule: ScaleSchedule | None = None) -> MVAR:
    """Loads a published VAR or M-VAR network in eval mode; its configuration is inferred from keys and shapes.

    Args:
        source: a .pth or .safetensors file, a name such as `var-d16`, or a state dict with the published keys.
        schedule: scale schedule of weights that lack the buffer `lvl_1L`.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of a published network.
    """
    state, name = read_published_state(source, "network")
    config, weights = network_from_published(state, name, schedule)
    with torch.device("meta"):
        network = MVAR(config)
    return load_strictly(network, weights, name)


def load_official(
    network: str | Path, tokenizer: str | Path | None = None, schedule: ScaleSchedule | None = None
) -> TrainedModel:
    """Loads a published network with its tokenizer; see `open_official`."""
    return open_official(network, tokenizer, schedule).load()


def open_official(
    network: str | Path, tokenizer: str | Path | None = None, schedule: ScaleSchedule | None = None
) -> StoredModel:
    """Opens a published network with its tokenizer; the classes have no names.

    Args:
        network: a .pth or .safetensors file, possibly a checkpoint of the published trainer, which holds both parts.
        tokenizer: a published file, an exported folder, or a name on the Hub; default: the tokenizer in `network`.
        schedule: scale schedule of weights that lack it.

    Raises:
        InputError: if a file cannot be read or is in another format, or the tokenizer does not fit the network.
    """
    state, name = read_published_state(network, "network")
    config, weights = network_from_published(state, name, schedule)
    load = partial(load_its_tokenizer, network, tokenizer, config)
    return StoredModel(name, config, weights, [], load, tokenizer_folder=None if tokenizer is None else str(tokenizer))


def load_its_tokenizer(network: str | Path, tokenizer: str | Path | None, config: MVARConfig) -> Tokenizer:
    """Loads the tokenizer of a published network and checks that it fits; arguments as in `open_official`."""
    if tokenizer is None:
        try:
            loaded = load_official_tokenizer(network, config.schedule)
        except InputError as error:
            raise InputError(f"{error}; add --tokenizer {' or '.join(TOKENIZERS)}, or its file") from error
    else:
        loaded = load_tokenizer(tokenizer, config.schedule)
    check_pair(config, loaded.config, f"the tokenizer in {tokenizer or network}")
    return loaded
