"""Training checkpoints that survive a crash: written whole or not at all, checked before they are used.

A checkpoint is a file of `torch.save`, a zip archive that carries a checksum of every entry, or a folder with a share
of each rank (`torch.distributed.checkpoint`), which gets a seal: the sizes and checksums of its files.
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

NETWORK_KEY = "lightning_mvar"  # entry of a checkpoint that describes its network, and where its tokenizer is
NETWORK_PREFIX, EMA_PREFIX = "network.", "ema."  # of the weights
SEAL = "seal.json"
PLAIN_PART = "meta.pt"  # what a folder holds beside tensors, as Lightning names it
SUFFIX = ".ckpt"

WhichWeights = Literal["ema", "raw"]
Checksums = dict[str, tuple[int, int]]  # file: bytes, crc32


def checksums(folder: Path, share: int = 0, shares: int = 1) -> Checksums:
    """Of every `shares`-th file of a checkpoint folder: ranks divide the work."""
    return {path.name: size_and_crc(path) for path in sorted(folder.iterdir())[share::shares] if path.name != SEAL}


def size_and_crc(path: Path) -> tuple[int, int]:
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return path.stat().st_size, crc


def publish(temporary: Path, path: Path, seal: Checksums | None = None) -> None:
    """Give a finished checkpoint its name, once everything is on the disk; OSError if that fails."""
    if temporary.is_dir():
        (temporary / SEAL).write_text(json.dumps(seal))
        for file in temporary.iterdir():
            sync(file)
    sync(temporary)
    if path.is_dir():
        remove(path)  # a folder cannot be replaced in one step
    os.replace(temporary, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Take away the name first: what is half removed must not look like a checkpoint."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = hidden(path, "removed")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def hidden(path: Path, state: str) -> Path:
    """Where a checkpoint is while it is written or removed: beside its final name."""
    return path.with_name(f".{path.name}.{state}")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs were writing or removing."""
    for path in folder.glob(f".*{SUFFIX}.*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def newest_intact(folder: Path) -> Path | None:
    """The checkpoint of a folder that was written last and can be read to its end; None if there is none.

    Damaged ones are skipped, with a warning that names them.
    """
    for path in by_time(folder):
        try:
            check_intact(path)
        except InputError as error:
            log.warning("skipped: %s", error)
        else:
            return path
    return None


def by_time(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the one that was written last first."""
    paths = [path for path in folder.glob(f"[!.]*{SUFFIX}") if not path.is_symlink()]
    return sorted(paths, key=lambda path: (written_at(path), path.name), reverse=True)


def written_at(path: Path) -> int:
    seal = path / SEAL
    return (seal if seal.is_file() else path).stat().st_mtime_ns


def check_intact(path: Path) -> None:
    """Read all of a checkpoint.

    Raises:
        InputError: if it is missing, cut short or altered, naming the file.
    """
    if path.is_dir():
        check_folder(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is missing or damaged ({str(error) or type(error).__name__})") from error
    if bad is not None:
        raise InputError(f"{path} is damaged (in {bad})")


def check_folder(folder: Path, read: bool = True) -> None:
    """Compare the sizes of a folder's files with its seal, and if they are to be `read`, their checksums."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        expected = {name: (size, crc) for name, (size, crc) in seal.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is no finished checkpoint: {folder / SEAL} is missing or damaged") from error
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name, (size, crc) in expected.items():
        if found.get(name) != size or (read and size_and_crc(folder / name) != (size, crc)):
            raise InputError(f"{folder / name} is damaged: {found.get(name, 0)} bytes, {size} were written")


def read_plain_part(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: of a file also the tensors, which are read when they are used.

    Raises:
        InputError: if there is no checkpoint or it cannot be read.
    """
    return read_torch(path / PLAIN_PART if path.is_dir() else path)


def read_tensors(path: Path, prefix: str) -> StateDict:
    """The tensors of a checkpoint's network whose names start with `prefix`, without it; nothing else is read.

    Shares of all ranks are put together on this process's CPU.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    if not path.is_dir():
        weights = read_torch(path)["state_dict"]
    else:
        check_folder(path, read=False)
        full = f"state_dict.{prefix}"
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        wanted = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith(full) and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what no_dist asks for
            dcp.load(wanted, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        weights = {name.removeprefix("state_dict."): tensor for name, tensor in wanted.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def describe(network: MVARConfig, tokenizer: str, fingerprint: str, class_names: list[str]) -> dict[str, Any]:
    """What a training checkpoint stores under `NETWORK_KEY`, for `load_checkpoint`; plain types only."""
    return {
        "network": asdict(network),
        "tokenizer": {"path": tokenizer, "fingerprint": fingerprint},
        "class_names": class_names,
    }


def load_checkpoint(path: Path, tokenizer: str | Path | None, weights: WhichWeights) -> TrainedModel:
    """Loads the network of a training checkpoint, and the tokenizer that it was trained with; see `load_trained`."""
    checkpoint = read_plain_part(path)
    if NETWORK_KEY not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of `lightning-mvar fit`")
    about = checkpoint[NETWORK_KEY]
    prefix = EMA_PREFIX if weights == "ema" and about["run"]["ema"] else NETWORK_PREFIX
    network = build_network(about["network"], read_tensors(path, prefix), path)
    loaded = load_tokenizer(tokenizer or about["tokenizer"]["path"])
    if (fingerprint := loaded.fingerprint()) != about["tokenizer"]["fingerprint"]:
        raise InputError(
            f"{path} was trained with tokenizer {about['tokenizer']['fingerprint']}, but "
            f"{tokenizer or about['tokenizer']['path']} holds {fingerprint}: name the right one with --tokenizer"
        )
    return TrainedModel(network, loaded, about["class_names"])
