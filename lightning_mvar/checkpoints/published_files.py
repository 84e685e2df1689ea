"""Files of published VAR, M-VAR and tokenizer weights, also inside the checkpoints of trainers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_mvar.checkpoints.folders import load_tokenizer, require_folder
from lightning_mvar.checkpoints.hub import TOKENIZERS, locate
from lightning_mvar.checkpoints.pair import TrainedModel, check_pair
from lightning_mvar.checkpoints.published import (
    M_VAR,
    network_from_published,
    network_to_published,
    tokenizer_from_published,
    tokenizer_to_published,
)
from lightning_mvar.checkpoints.stored import StoredModel
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import StateDict, load_strictly, read_any, save_torch
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer

PARTS = {  # a key of each part, and what the published trainers call the part
    "network": ("word_embed.weight", {"mvar_wo_ddp", "var_wo_ddp"}),
    "tokenizer": ("quantize.embedding.weight", {"vae_local"}),
}
WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def save_official(folder: str | Path, model: TrainedModel) -> list[Path]:
    """Writes network and tokenizer in the published format; returns the two files, which have the published names.

    Raises:
        InputError: if the published code does not support such a network or tokenizer.
    """
    network, tokenizer = model.network.config, model.tokenizer.config
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
    """Loads a published VAR or M-VAR network in eval mode; its configuration is read off keys and shapes.

    Args:
        source: a .pth or .safetensors file, or a state dict with the published keys.
        schedule: scale schedule of weights that do not contain it, that is, lack the buffer `lvl_1L`.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of a published network.
    """
    state, name = read_published_state(source, "network")
    config, weights = network_from_published(state, name, schedule)
    with torch.device("meta"):
        network = MVAR(config)
    return load_strictly(network, weights, name)


def load_official_tokenizer(source: str | Path | Mapping[str, Tensor], schedule: ScaleSchedule) -> Tokenizer:
    """Loads a published tokenizer in eval mode; its configuration, except the schedule, is read off keys and shapes.

    Args:
        source: a .pth or .safetensors file, or a state dict with the published keys.
        schedule: scale schedule to use it with; the weights do not contain it.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of the published tokenizer.
    """
    state, name = read_published_state(source, "tokenizer")
    return tokenizer_from_published(state, schedule, name)


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
        tokenizer: a published file, a folder of ours, or a name on the Hub; default: the tokenizer in `network`.
        schedule: scale schedule of weights that do not contain it.

    Raises:
        InputError: if a file cannot be read or has another format, or the tokenizer does not fit the network.
    """
    state, name = read_published_state(network, "network")
    config, weights = network_from_published(state, name, schedule)
    return StoredModel(name, config, weights, [], partial(load_its_tokenizer, network, tokenizer, config))


def load_its_tokenizer(network: str | Path, tokenizer: str | Path | None, config: MVARConfig) -> Tokenizer:
    """Loads the tokenizer of a published network, and checks that it fits; arguments as of `open_official`."""
    if tokenizer is None:
        try:
            loaded = load_official_tokenizer(network, config.schedule)
        except InputError as error:
            raise InputError(f"{error}; add --tokenizer {' or '.join(TOKENIZERS)}, or its file") from error
    elif (path := locate(tokenizer).path).is_dir():
        loaded = load_tokenizer(path)
    else:
        loaded = load_official_tokenizer(path, config.schedule)
    check_pair(config, loaded.config, f"the tokenizer in {tokenizer or network}")
    return loaded


def read_published_state(source: str | Path | Mapping[str, Tensor], part: str) -> tuple[StateDict, str]:
    """Returns a flat state dict and a name for messages, from a file or a dictionary in memory.

    Weights may lie anywhere in nested dictionaries, as trainers save them: `trainer`, `model`, `state_dict`, `ema`.
    Those under the part's own name go first, then averaged ones. Names that wrapped or compiled modules add are
    removed, and a prefix like `model.`. What lies beside the weights is not read.

    Raises:
        InputError: if the file cannot be read or holds no tensors by name.
    """
    name, content = f"the {part} state dict", cast(Any, source)
    if isinstance(source, str | Path):
        name, content = str(source), read_any(Path(source).expanduser())
    mark, own_names = PARTS[part]
    places = [*state_dicts(content)]
    if not places:
        raise InputError(f"{name} is not a state dict of a published {part}")
    places.sort(key=lambda place: (own_names.isdisjoint(place[0]), not any("ema" in str(key) for key in place[0])))
    marked = [state for _, state in places if any(f".{key}".endswith(f".{mark}") for key in state)]
    state = marked[0] if marked else places[0][1]
    prefix = next((key.removesuffix(mark) for key in state if f".{key}".endswith(f".{mark}")), "")
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}, name


def state_dicts(content: Any) -> Iterator[tuple[tuple[Any, ...], StateDict]]:
    """Yields the tensors by name of each nested dictionary that has any, outermost first, with the path to it."""
    pending: list[tuple[tuple[Any, ...], Any]] = [((), content)]
    seen: set[int] = set()  # dictionaries of a file may refer to each other
    for path, values in pending:
        if isinstance(values, Mapping) and id(values) not in seen:
            seen.add(id(values))
            pending.extend(((*path, key), part) for key, part in values.items())
            named = [key for key, part in values.items() if isinstance(key, str) and isinstance(part, Tensor)]
            if named:
                yield path, {WRAPPERS.sub("", key): values[key] for key in named}
