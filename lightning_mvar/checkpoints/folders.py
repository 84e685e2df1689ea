"""Self-contained folders of a tokenizer, or of a network with its tokenizer: `config.json` and safetensors.

A folder holds `config.json`, `tokenizer.safetensors` and, with a network, `network.safetensors`. `config.json` is
written last, so a folder that has one is complete. Modules are built on the meta device and loaded tensors are assigned
to them, so memory holds the weights once (and, temporarily, the mapped pages of the file).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from lightning_mvar.checkpoints.pair import check_pair
from lightning_mvar.checkpoints.state_dicts import load_official_tokenizer
from lightning_mvar.checkpoints.stored import StoredModel
from lightning_mvar.errors import InputError
from lightning_mvar.io.hub import TOKENIZER_KINDS, locate
from lightning_mvar.io.json_files import FormatVersion, read_json, write_json
from lightning_mvar.io.tensors import load_strictly, read_weights, save_weights
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig

CONFIG, TOKENIZER = "config.json", "tokenizer.safetensors"
FORMAT = FormatVersion(1, "install the release of lightning_mvar that wrote it, or write it again with this one")


@dataclass(frozen=True)
class MergedNetwork:
    """One network of a linear combination.

    Args:
        path: its path, as given to `merge`.
        part: for a checkpoint, the module whose weights were used: network, ema or power_averages.N.
        coefficient: factor on its weights.
    """

    path: str
    part: str
    coefficient: float


@dataclass(frozen=True)
class FolderConfig:
    """The contents of `config.json`.

    Args:
        format_version: version of this format.
        tokenizer: architecture of the tokenizer.
        network: architecture of the network, if the folder has one.
        class_names: names of the network's classes in label order; empty if they have none.
        merged: the networks that `merge` combined, if it wrote the folder.
    """

    format_version: int
    tokenizer: TokenizerConfig
    network: MVARConfig | None = None
    class_names: list[str] = field(default_factory=list)
    merged: list[MergedNetwork] | None = None

    def __post_init__(self) -> None:
        check_class_names(self.network, self.class_names)


def check_class_names(network: MVARConfig | None, names: list[str]) -> None:
    """Raises InputError unless there are no class names or one per class of the network."""
    if names and len(names) != (count := 0 if network is None else network.num_classes):
        raise InputError(f"class_names has {len(names)} names for {count} classes; give one name per class or none")


def save_folder(
    folder: str | Path, tokenizer: Tokenizer, network: MVAR | None = None, class_names: list[str] | None = None
) -> None:
    """Writes a tokenizer, or a network with its tokenizer, as one self-contained folder.

    Raises:
        InputError: if the folder cannot be written, or the number of class names is wrong.
    """
    config = FolderConfig(
        FORMAT.number, tokenizer.config, None if network is None else network.config, class_names or []
    )
    save_network = None if network is None else partial(save_weights, network)
    write_folder(Path(folder).expanduser(), config, tokenizer, save_network)


def write_folder(
    folder: Path, config: FolderConfig, tokenizer: Tokenizer, save_network: Callable[[Path], None] | None
) -> None:
    """Writes a folder; `save_network` writes the network's weights to a given path."""
    require_folder(folder)
    try:
        (folder / CONFIG).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror})") from error
    save_weights(tokenizer, folder / TOKENIZER)
    if save_network is not None:
        save_network(folder / "network.safetensors")
    values = asdict(config)
    if config.network is None:
        del values["network"], values["class_names"]
    if config.merged is None:
        del values["merged"]
    write_json(folder / CONFIG, values)


def require_folder(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{folder} is a file; name a folder to write to")


def load_tokenizer(place: str | Path, schedule: ScaleSchedule | None = None) -> Tokenizer:
    """Loads a tokenizer in eval mode.

    Args:
        place: folder that `train-tokenizer` or `export` wrote, published file, or name on the Hub, see `io.hub`.
        schedule: scale schedule to use with a published file, which contains none; default: the one for 256 x 256
            images (`export --tokenizer FILE --resolution` writes a folder with another).

    Raises:
        InputError: if there is no tokenizer.
    """
    folder = locate(place).path
    if not folder.exists():
        raise InputError(f"{folder} does not exist; it must be {TOKENIZER_KINDS}")
    if folder.is_file():
        return load_official_tokenizer(folder, schedule or ScaleSchedule.for_resolution(256))
    config = read_config(folder, "tokenizer", "train one with `lightning-mvar train-tokenizer`")
    with torch.device("meta"):
        tokenizer = Tokenizer(config.tokenizer)
    return load_strictly(tokenizer, read_weights(folder / TOKENIZER), folder)


def open_folder(folder: Path, tokenizer: str | Path | None = None) -> StoredModel:
    """Opens an exported folder.

    Args:
        folder: a folder that `export` wrote.
        tokenizer: tokenizer to use instead of the folder's own, see `load_tokenizer`.

    Raises:
        InputError: if a file is missing or damaged, or the tokenizer does not fit the network.
    """
    config = read_config(folder, "network", "write one with `lightning-mvar export`")
    if config.network is None:
        raise InputError(f"{folder / CONFIG} describes no network; write one with `lightning-mvar export`")
    weights = read_weights(folder / "network.safetensors")
    used = str(tokenizer or folder)
    loader = partial(load_fitting_tokenizer, used, config.network)
    return StoredModel(str(folder), config.network, weights, config.class_names, loader, tokenizer_folder=used)


def load_fitting_tokenizer(place: str | Path, network: MVARConfig) -> Tokenizer:
    """Loads a tokenizer; raises InputError if it does not fit the network."""
    tokenizer = load_tokenizer(place, network.schedule)
    check_pair(network, tokenizer.config, f"the tokenizer in {place}")
    return tokenizer


def read_config(folder: Path, part: str, remedy: str) -> FolderConfig:
    """Reads the configuration of a folder; `part` is what the caller needs, `remedy` how to write such a folder."""
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"{folder} has no {CONFIG}: not a finished {part} folder; {remedy}")
    return read_json(path, FolderConfig, version=FORMAT)
