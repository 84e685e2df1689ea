"""Training checkpoints that survive a crash: written atomically, checked before use.

A checkpoint is a file of `torch.save`, a zip archive that contains a checksum per entry, or a folder with one shard
per rank (`torch.distributed.checkpoint`) and a seal: a file with the sizes and checksums of the others. Its name
contains its step, which determines the newest checkpoint; file times would depend on the machines' clocks. `last.ckpt`
links to the newest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_mvar.checkpoints.folders import check_class_names, load_tokenizer
from lightning_mvar.checkpoints.power_ema import Profile
from lightning_mvar.checkpoints.sharded import ShardedTensors, read_all
from lightning_mvar.checkpoints.stored import StoredModel
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import open_regular, sync
from lightning_mvar.io.json_files import checked, read_json
from lightning_mvar.io.tensors import StateDict, check_storage, read_torch
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)

NETWORK_KEY = "lightning_mvar"  # checkpoint entry that describes the network and locates its tokenizer
NETWORK_PREFIX, EMA_PREFIX, POWER_PREFIX = "network.", "ema.", "power_averages."  # of the weights' keys
SEAL = "seal.json"
PLAIN_PART = "meta.pt"  # file of a sharded checkpoint for everything but tensors; Lightning chose the name
SUFFIX, LAST = ".ckpt", "last.ckpt"

WhichWeights = Literal["ema", "raw"]
Checksums = dict[str, tuple[int, int]]  # file: bytes, crc32


def size_and_crc(path: Path) -> tuple[int, int]:
    crc = 0
    with open_regular(path) as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return path.stat().st_size, crc


def publish(temporary: Path, path: Path, seal: Checksums | None = None, link: bool = False) -> None:
    """Syncs a finished checkpoint to disk, then renames it to `path`; raises OSError if either fails.

    Args:
        temporary: file or folder of the checkpoint.
        path: its final path.
        seal: checksums of a folder's files.
        link: whether to point `last.ckpt` to it. The link is made before the rename: a process killed in between leaves
            a dangling link, which is noticed, but never a link to older weights.
    """
    if temporary.is_dir():
        (temporary / SEAL).write_text(json.dumps(seal))
        for file in temporary.iterdir():
            sync(file)
    sync(temporary)
    if path.is_dir():
        remove_checkpoint(path)  # a folder cannot be replaced atomically
    if link:
        link_last(path)
    os.replace(temporary, path)
    sync(path.parent)


def link_last(path: Path) -> None:
    """Atomically points the `last.ckpt` next to a checkpoint to it."""
    link = path.with_name(LAST)
    temporary = hidden_path(link, "link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    os.replace(temporary, link)


def mend_last(folder: Path) -> None:
    """Points the link `last.ckpt` in a folder to its newest complete checkpoint, unless it does already."""
    link, newest = folder / LAST, newest_intact(folder)
    if newest is not None and link.is_symlink() and os.readlink(link) != newest.name:
        link_last(newest)


def resolve_last(path: Path) -> Path:
    """Returns the newest complete checkpoint for a link `last.ckpt`, and any other path as it is.

    The link itself may be out of date if a run was killed at the wrong moment.
    """
    return (path.name == LAST and path.is_symlink() and newest_intact(path.parent)) or path


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
    """Removes checkpoints that killed runs left half written or half removed."""
    for path in folder.glob(f".*{SUFFIX}.*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def newest_intact(folder: Path, verify_checksums: bool = False) -> Path | None:
    """Returns the newest complete checkpoint of a folder; None if it has none.

    Damaged ones are skipped with a warning; see `check_intact`.
    """
    for path in newest_first(folder):
        try:
            check_intact(path, verify_checksums)
        except InputError as error:
            log.warning("skipped: %s", error)
        else:
            return path
    return None


def newest_first(folder: Path) -> list[Path]:
    """Lists the checkpoints of a folder by step, highest first."""
    paths = [path for path in folder.glob(f"step=*{SUFFIX}") if step_of(path) >= 0 and not path.is_symlink()]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint; -1 if it has another name."""
    match = re.fullmatch(rf"step=(\d+){re.escape(SUFFIX)}", path.name)
    return -1 if match is None else int(match[1])


def check_intact(path: Path, verify_checksums: bool = False) -> None:
    """Checks that a checkpoint is complete: the sizes of a folder's files, or the index at the end of a file.

    Args:
        path: file or folder.
        verify_checksums: whether to also read it completely and verify its checksums.

    Raises:
        InputError: if it is missing, truncated or altered; the message names the file.
    """
    if path.is_dir():
        check_folder(path, verify_checksums)
        return
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            damaged = archive.testzip() if verify_checksums else None
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is missing or damaged ({str(error) or type(error).__name__})") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged (in {damaged})")


def check_folder(folder: Path, verify_checksums: bool) -> None:
    """Compares a folder's files with its seal: sizes, and checksums if requested; raises InputError on a mismatch."""
    try:
        expected = read_json(folder / SEAL, dict[str, tuple[int, int]])
    except InputError as error:
        raise InputError(f"{folder} is not a finished checkpoint: {folder / SEAL} is missing or damaged") from error
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name, (size, crc) in expected.items():
        if sizes.get(name) != size:
            raise InputError(f"{folder / name} is damaged: it has {sizes.get(name, 0)} bytes, but {size} were written")
        if verify_checksums and size_and_crc(folder / name) != (size, crc):
            raise InputError(f"{folder / name} is damaged: its CRC-32 is not that of the seal")


def read_plain_part(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without the tensors of a sharded one; those of a file are mapped and read on first use.

    Raises:
        InputError: if the checkpoint does not exist or cannot be read.
    """
    return read_torch(path / PLAIN_PART if path.is_dir() else path)


def open_tensors(path: Path, prefix: str) -> Mapping[str, Tensor]:
    """Opens the weights of a checkpoint whose names start with `prefix`, named without it; each is read on use.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    if path.is_dir():
        check_folder(path, verify_checksums=False)
        return ShardedTensors(path, f"state_dict.{prefix}")
    weights = read_torch(path).get("state_dict")
    if not isinstance(weights, dict):
        raise InputError(f"{path} has no state_dict")
    named = {name: part for name, part in weights.items() if isinstance(name, str) and isinstance(part, Tensor)}
    tensors = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    check_storage([*tensors.values()], path)
    return tensors


def read_tensors(path: Path, prefix: str) -> StateDict:
    """Reads all tensors that `open_tensors` opens."""
    return read_all(open_tensors(path, prefix))


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer with which a network was trained: its path or name on the Hub, and its fingerprint."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class ReferenceRecord:
    """The frozen network to which an objective compares the trained one: its path and a fingerprint of its weights."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class RunRecord:
    """State of a run that Lightning does not store.

    Args:
        ema: whether the weights are averaged.
        skipped_steps: number of skipped steps so far, and how many of them directly precede the checkpoint.
        world_size: number of ranks.
        batch_of_all_ranks: images per batch over all ranks; None if the data were not a `TokenDataModule`.
        ema_decay: decay of the average; None without one, and in checkpoints of older versions.
        reference: the objective's frozen network; None if it has none.
        power_ema: relative widths of the power-function averages.
        muon: whether Muon trains the matrices of the blocks.
        freeze: name patterns of the parameters that are not trained; None in checkpoints of older versions.
    """

    ema: bool
    skipped_steps: tuple[int, int]
    world_size: int
    batch_of_all_ranks: int | None
    ema_decay: float | None = None
    reference: ReferenceRecord | None = None
    power_ema: list[float] = field(default_factory=list)
    muon: bool = False
    freeze: list[str] | None = None


@dataclass(frozen=True)
class NetworkRecord:
    """The `NETWORK_KEY` entry of a training checkpoint, stored as plain types.

    Args:
        network: architecture of the network.
        tokenizer: its tokenizer.
        class_names: names of the classes in label order.
        run: state of the run.
    """

    network: MVARConfig
    tokenizer: TokenizerRecord
    class_names: list[str]
    run: RunRecord

    def __post_init__(self) -> None:
        check_class_names(self.network, self.class_names)


def open_checkpoint(path: Path, tokenizer: str | Path | None, weights: WhichWeights) -> StoredModel:
    """Opens the network of a training checkpoint and its tokenizer; see `open_trained`."""
    record = read_record(path, read_plain_part(path))
    return open_part(path, record, EMA_PREFIX if weights == "ema" and record.run.ema else NETWORK_PREFIX, tokenizer)


def open_snapshots(path: Path, tokenizer: str | Path | None) -> list[tuple[Profile, StoredModel]]:
    """Opens the power-function averages of a training checkpoint.

    Raises:
        InputError: if the checkpoint is missing or damaged, or its run keeps no such averages.
    """
    if path.is_dir() and not (path / PLAIN_PART).is_file():
        raise InputError(
            f"{path} is not a snapshot: name checkpoints of a run with model.power_ema, such as those in the folder "
            f"`snapshots` that configs/callbacks/snapshots.yaml keeps"
        )
    checkpoint = read_plain_part(path)
    record, step = read_record(path, checkpoint), checkpoint.get("global_step")
    if not record.run.power_ema:
        raise InputError(
            f"{path} has no power-function averages: set model.power_ema in `fit`, for example to [0.05, 0.10]"
        )
    if type(step) is not int or step < 1:
        raise InputError(f"{path} is damaged, or from before the first step: its global_step is {step!r}")
    parts = enumerate(record.run.power_ema)
    return [(Profile(step, sigma), open_part(path, record, f"{POWER_PREFIX}{i}.", tokenizer)) for i, sigma in parts]


def read_record(path: Path, checkpoint: dict[str, Any]) -> NetworkRecord:
    """Returns the description of the network in the plain part of a checkpoint."""
    if NETWORK_KEY not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of `lightning-mvar fit`")
    return checked(checkpoint[NETWORK_KEY], NetworkRecord, str(path))


def open_part(path: Path, record: NetworkRecord, prefix: str, tokenizer: str | Path | None) -> StoredModel:
    """Opens the network of a checkpoint whose weights' names start with `prefix`."""
    return StoredModel(
        str(path),
        record.network,
        open_tensors(path, prefix),
        record.class_names,
        partial(load_recorded_tokenizer, path, tokenizer, record),
        prefix.removesuffix("."),
        record.tokenizer.fingerprint,
        str(tokenizer or record.tokenizer.path),
    )


def load_recorded_tokenizer(checkpoint: Path, moved: str | Path | None, record: NetworkRecord) -> Tokenizer:
    """Loads the tokenizer of a checkpoint, from `moved` if given; raises InputError if it is a different one."""
    place, expected = moved or record.tokenizer.path, record.tokenizer.fingerprint
    if moved is None and Path(place).is_absolute() and not Path(place).exists():
        raise InputError(f"the tokenizer of {checkpoint} is no longer in {place}: pass its folder with --tokenizer")
    tokenizer = load_tokenizer(place, record.network.schedule)
    if (fingerprint := tokenizer.fingerprint()) != expected:
        raise InputError(
            f"{checkpoint} was trained with tokenizer {expected}, but {place} holds {fingerprint}: pass the right "
            f"one with --tokenizer"
        )
    return tokenizer
