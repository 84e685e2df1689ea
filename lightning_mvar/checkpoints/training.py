"""Training checkpoints that survive a crash: written atomically, verified before they are used.

A checkpoint is a file of `torch.save`, a zip archive that contains a checksum per entry, or a folder with one shard
per rank (`torch.distributed.checkpoint`) and a seal: a file with the sizes and checksums of the others.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_mvar.checkpoints.folders import build_network, load_tokenizer
from lightning_mvar.checkpoints.pair import TrainedModel
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import sync
from lightning_mvar.io.tensors import StateDict, read_torch
from lightning_mvar.models.config import MVARConfig

log = logging.getLogger(__name__)

NETWORK_KEY = "lightning_mvar"  # checkpoint entry that describes the network and where its tokenizer is
NETWORK_PREFIX, EMA_PREFIX = "network.", "ema."  # of the keys of the weights
SEAL = "seal.json"
PLAIN_PART = "meta.pt"  # file of a sharded checkpoint for everything but tensors; Lightning chose the name
SUFFIX = ".ckpt"

WhichWeights = Literal["ema", "raw"]
Checksums = dict[str, tuple[int, int]]  # file: bytes, crc32


def checksums(folder: Path, rank: int = 0, world_size: int = 1) -> Checksums:
    """Computes the checksums of every `world_size`-th file of a checkpoint folder, so that ranks share the work."""
    return {path.name: size_and_crc(path) for path in sorted(folder.iterdir())[rank::world_size] if path.name != SEAL}


def size_and_crc(path: Path) -> tuple[int, int]:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return path.stat().st_size, crc


def publish(temporary: Path, path: Path, seal: Checksums | None = None) -> None:
    """Syncs a finished checkpoint to disk, then renames it to `path`; raises OSError if either fails."""
    if temporary.is_dir():
        (temporary / SEAL).write_text(json.dumps(seal))
        for file in temporary.iterdir():
            sync(file)
    sync(temporary)
    if path.is_dir():
        remove_checkpoint(path)  # a folder cannot be replaced atomically
    os.replace(temporary, path)
    sync(path.parent)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint. A folder is renamed first, so that a half-removed one does not look like a checkpoint."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    removed = hidden_path(path, "removed")
    os.replace(path, removed)
    shutil.rmtree(removed)


def hidden_path(path: Path, state: str) -> Path:
    """Returns the path of a checkpoint while it is written or removed: a hidden sibling of its final path."""
    return path.with_name(f".{path.name}.{state}")


def remove_leftovers(folder: Path) -> None:
    """Removes the checkpoints that killed runs left half written or half removed."""
    for path in folder.glob(f".*{SUFFIX}.*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def newest_intact(folder: Path) -> Path | None:
    """Returns the newest intact checkpoint of a folder; None if it has none.

    Damaged ones are skipped with a warning.
    """
    for path in newest_first(folder):
        try:
            check_intact(path)
        except InputError as error:
            log.warning("skipped: %s", error)
        else:
            return path
    return None


def newest_first(folder: Path) -> list[Path]:
    """Lists the checkpoints of a folder, newest first."""
    paths = [path for path in folder.glob(f"[!.]*{SUFFIX}") if not path.is_symlink()]
    return sorted(paths, key=lambda path: (write_time(path), path.name), reverse=True)


def write_time(path: Path) -> int:
    seal = path / SEAL
    return (seal if seal.is_file() else path).stat().st_mtime_ns


def check_intact(path: Path) -> None:
    """Reads a checkpoint completely and verifies its checksums.

    Raises:
        InputError: if it is missing, truncated or altered; the message names the file.
    """
    if path.is_dir():
        check_folder(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is missing or damaged ({str(error) or type(error).__name__})") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged (in {damaged})")


def check_folder(folder: Path, verify_checksums: bool = True) -> None:
    """Compares the sizes and checksums of a folder's files with its seal; raises InputError at the first mismatch."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        expected = {name: (size, crc) for name, (size, crc) in seal.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is not a finished checkpoint: {folder / SEAL} is missing or damaged") from error
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name, (size, crc) in expected.items():
        if sizes.get(name) != size or (verify_checksums and size_and_crc(folder / name) != (size, crc)):
            raise InputError(f"{folder / name} is damaged: it has {sizes.get(name, 0)} bytes, {size} were written")


def read_plain_part(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without the tensors of a sharded one; those of a file are mapped and read on first use.

    Raises:
        InputError: if the checkpoint does not exist or cannot be read.
    """
    return read_torch(path / PLAIN_PART if path.is_dir() else path)


def read_tensors(path: Path, prefix: str) -> StateDict:
    """Reads only the weights of a checkpoint whose names start with `prefix`; returns them without the prefix.

    The shards of all ranks are joined on the CPU of this process.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    if not path.is_dir():
        weights = read_torch(path)["state_dict"]
    else:
        check_folder(path, verify_checksums=False)
        full_prefix = f"state_dict.{prefix}"
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith(full_prefix) and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected with no_dist
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        weights = {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def describe_network(network: MVARConfig, tokenizer: str, fingerprint: str, class_names: list[str]) -> dict[str, Any]:
    """Returns the `NETWORK_KEY` entry of a training checkpoint, which `load_checkpoint` reads; plain types only."""
    return {
        "network": asdict(network),
        "tokenizer": {"path": tokenizer, "fingerprint": fingerprint},
        "class_names": class_names,
    }


def load_checkpoint(path: Path, tokenizer: str | Path | None, weights: WhichWeights) -> TrainedModel:
    """Loads the network of a training checkpoint and the tokenizer it was trained with; see `load_trained`."""
    checkpoint = read_plain_part(path)
    if NETWORK_KEY not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of `lightning-mvar fit`")
    record = checkpoint[NETWORK_KEY]
    prefix = EMA_PREFIX if weights == "ema" and record["run"]["ema"] else NETWORK_PREFIX
    network = build_network(record["network"], read_tensors(path, prefix), path)
    loaded = load_tokenizer(tokenizer or record["tokenizer"]["path"])
    if (fingerprint := loaded.fingerprint()) != record["tokenizer"]["fingerprint"]:
        raise InputError(
            f"{path} was trained with tokenizer {record['tokenizer']['fingerprint']}, but "
            f"{tokenizer or record['tokenizer']['path']} holds {fingerprint}: pass the right one with --tokenizer"
        )
    return TrainedModel(network, loaded, record["class_names"])
