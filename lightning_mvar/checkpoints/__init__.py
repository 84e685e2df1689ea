"""Networks and tokenizers on disk: exported folders, training checkpoints and published files."""

from __future__ import annotations

from pathlib import Path

from lightning_mvar.checkpoints.folders import CONFIG, load_tokenizer, open_folder, save_folder
from lightning_mvar.checkpoints.pair import TrainedModel, check_pair
from lightning_mvar.checkpoints.published_files import load_official, load_official_mvar, open_official, save_official
from lightning_mvar.checkpoints.state_dicts import load_official_tokenizer
from lightning_mvar.checkpoints.stored import StoredModel
from lightning_mvar.checkpoints.training import PLAIN_PART, WhichWeights, open_checkpoint, resolve_last
from lightning_mvar.errors import InputError
from lightning_mvar.io.hub import NETWORK_KINDS, PUBLISHED, locate

__all__ = [
    "StoredModel",
    "TrainedModel",
    "WhichWeights",
    "check_pair",
    "load_official",
    "load_official_mvar",
    "load_official_tokenizer",
    "load_tokenizer",
    "load_trained",
    "open_trained",
    "save_folder",
    "save_official",
]


def load_trained(path: str | Path, tokenizer: str | Path | None = None, weights: WhichWeights = "ema") -> TrainedModel:
    """Loads a network with its tokenizer; see `open_trained` for arguments and errors."""
    return open_trained(path, tokenizer, weights).load()


def open_trained(path: str | Path, tokenizer: str | Path | None = None, weights: WhichWeights = "ema") -> StoredModel:
    """Opens a training checkpoint, an exported folder or a published file; tensors are read on use.

    Args:
        path: checkpoint file, folder of a sharded checkpoint (only its weights are read), folder of `export`, or file
            of published VAR or M-VAR weights (.pth, .pt, .bin or .safetensors). A link `last.ckpt` stands for the
            newest complete checkpoint next to it, wherever it points. Or a name on the Hub, see `io.hub`.
        tokenizer: the tokenizer, see `load_tokenizer`, if it has moved or the published file does not contain it.
        weights: for a training checkpoint, `ema` for the averaged weights if it has them, `raw` for the last ones.

    Raises:
        InputError: if a file is missing or in another format, or the tokenizer does not fit the network.
    """
    path, default_tokenizer = locate(path)
    if path.suffix in PUBLISHED and path.is_file():
        return open_official(path, tokenizer or default_tokenizer)
    path = resolve_last(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; it must be {NETWORK_KINDS}")
    if path.is_dir() and ((path / CONFIG).exists() or not (path / PLAIN_PART).is_file()):
        return open_folder(path, tokenizer)
    return open_checkpoint(path, tokenizer, weights)
