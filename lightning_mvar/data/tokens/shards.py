"""Token shards: the format, the manifest, writing and reading.

A folder of shards holds `manifest.json` and tar files in the WebDataset format, readable with plain `webdataset`. Each
tar sample is a pack of up to `PACK_SIZE` images, which makes reading a slice of an array instead of Python per image:

    KEY.tokens.npy   (n, l) uint16     all scales packed, coarse to fine
    KEY.labels.npy   (n,) int64        class of each image
    KEY.keys.json    n strings         where each image came from

A shard appears under its name whole or not at all. While a folder is being written, by any number of processes, what
the manifest will say of each finished shard is in `parts/`; in the end it is moved to the manifest. The manifest
carries what a network must agree with: schedule, vocabulary, classes, and the fingerprint of the tokenizer.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, remove_unfinished
from lightning_mvar.scales import ScaleSchedule, Shape

FORMAT_VERSION = 3
PACK_SIZE = 512  # images in one tar sample: 0.7 MB at 680 tokens
MANIFEST = "manifest.json"
MEMBERS = ("tokens.npy", "labels.npy", "keys.json")  # of a pack
PARTS = "parts"


class Pack(NamedTuple):
    """Consecutive images of a shard."""

    tokens: NDArray[np.uint16]  # (n, l)
    labels: NDArray[np.int64]  # (n,)
    keys: list[str]


@dataclass
class Shard:
    """One finished shard, as the manifest lists it, with a message for each image, by its key, that was not read."""

    name: str
    samples: int
    bytes: int
    sha256: str
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def is_file_name(self) -> bool:
        """Whether the name is that of a file in the manifest's folder."""
        return isinstance(self.name, str) and re.fullmatch(r"\w[\w.-]*", self.name) is not None

    def path_in(self, folder: Path) -> Path:
        """The shard's file in a folder.

        Raises:
            InputError: if the name is not that of a file in the folder: a manifest may come from anybody.
        """
        if not self.is_file_name:
            raise InputError(f"{folder / MANIFEST} is damaged: it lists a shard {self.name!r}, which is no file name")
        return folder / self.name

    def is_intact(self, folder: Path) -> bool:
        path = self.path_in(folder)
        return path.is_file() and path.stat().st_size == self.bytes and sha256_of(path) == self.sha256


@dataclass
class Manifest:
    """What a folder of shards holds.

    Args:
        side_lengths: the schedule of the tokens.
        vocab_size: tokens are in [0, vocab_size).
        class_names: name of each class, in label order.
        tokenizer: fingerprint of the tokenizer that made the tokens.
        source: where the images came from.
        num_images: images of the source.
        shard_size: samples that each shard covers, the last one fewer.
        order: a hash of the order in which the images went into the shards.
        listing: a hash of the images' names and labels.
        views: token samples made of each image: random crops, or its centre where there is one.
        seed: of the random crops.
        flips: whether half of the crops are mirrored.
        precision: of the encoder.
        shards: the finished shards, in order.
        format_version: of this format.
    """

    side_lengths: list[int | Shape]
    vocab_size: int
    class_names: list[str]
    tokenizer: str
    source: str
    num_images: int
    shard_size: int
    order: str = ""
    listing: str = ""
    views: int = 1
    seed: int = 0
    flips: bool = False
    precision: str = "float32"
    shards: list[Shard] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def schedule(self) -> ScaleSchedule:
        """Raises InputError for side lengths that are none."""
        return ScaleSchedule(tuple(self.side_lengths))

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def skipped(self) -> list[str]:
        """A message for each image that could not be read, once, whatever the views."""
        return list(self.failures().values())

    @property
    def offsets(self) -> list[int]:
        """The number, counted through the shards, of the first sample of each."""
        return [0, *accumulate(shard.samples for shard in self.shards)][:-1]

    @property
    def num_shards(self) -> int:
        """Shards that a finished folder has."""
        return -(-self.num_images * self.views // self.shard_size)

    def failures(self) -> dict[str, str]:
        """The same by the images' keys."""
        return {key: message for shard in self.shards for key, message in shard.skipped.items()}

    def same_run(self, other: Manifest) -> bool:
        """Whether the other describes the same images, wherever they are stored, tokenizer and cut into shards."""
        mine, theirs = asdict(self), asdict(other)
        return all(mine[key] == theirs[key] for key in mine if key not in ("shards", "source"))

    def save(self, folder: Path) -> None:
        """Write the manifest, with what is in `parts`, and no more parts."""
        with atomic_path(folder / MANIFEST) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        if (folder / PARTS).is_dir():
            shutil.rmtree(folder / PARTS)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of `folder`, and what its parts say of shards that have been finished since.

        Raises:
            InputError: if there is none, or it is not of this format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(
                f"no token shards in {folder}: {path} does not exist; write them with `lightning-mvar tokenize`"
            )
        return cls.parse(path.read_text(errors="replace"), str(path), records_of(folder))

    @classmethod
    def parse(cls, text: str, where: str, parts: Sequence[Path] = ()) -> Manifest:
        """The manifest that was read from `where`, with what its parts say of shards that have been finished since.

        Raises:
            InputError: if it is not of this format.
        """
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise InputError(
                    f"{where} has format version {version}; this release reads {FORMAT_VERSION}: tokenize again"
                )
            newer = [read_record(path) for path in parts]
            names = {shard.name for shard in newer}
            shards = [Shard(**shard) for shard in values["shards"] if shard["name"] not in names]
            values["shards"] = sorted(shards + newer, key=lambda shard: shard.name)
            values["side_lengths"] = [tuple(s) if isinstance(s, list) else s for s in values["side_lengths"]]
            return cls(**values)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{where}, or a file of {PARTS} beside it, is damaged ({error!r}); remove that file, and run the same "
                f"`lightning-mvar tokenize` again"
            ) from error

    def check_model(
        self, where: object, side_lengths: tuple[int | Shape, ...], vocab_size: int, num_classes: int, tokenizer: str
    ) -> None:
        """Raise InputError unless a network of these properties can learn these tokens, which are at `where`."""
        for what, ours, theirs in (
            ("side_lengths", list(self.side_lengths), list(side_lengths)),
            ("vocab_size", self.vocab_size, vocab_size),
            ("num_classes", len(self.class_names), num_classes),
            ("tokenizer fingerprint", self.tokenizer, tokenizer),
        ):
            if ours != theirs:
                raise InputError(
                    f"the shards in {where} do not fit the model: {what} is {ours} in the shards and {theirs} in the "
                    f"model; set the model's to match, or tokenize again with the model's tokenizer"
                )

    def check_finished(self, where: object) -> None:
        """Raise InputError unless every shard is listed."""
        if len(self.shards) < self.num_shards:
            raise InputError(
                f"{where} is unfinished: {len(self.shards)} of {self.num_shards} shards; run the same "
                f"`lightning-mvar tokenize` again, it continues where it stopped"
            )

    def check_files(self, folder: Path) -> None:
        """Raise InputError unless every shard of a finished folder is there in its full size."""
        self.check_finished(folder)
        for shard in self.shards:
            path = shard.path_in(folder)
            size = path.stat().st_size if path.is_file() else 0
            if size != shard.bytes:
                raise InputError(
                    f"{path} is {'missing' if not size else f'truncated or altered: {size} bytes'}, the manifest says "
                    f"{shard.bytes}; run the same `lightning-mvar tokenize` again, it rewrites that shard only"
                )


def chosen_samples(manifest: Manifest, fetch: Callable[[Shard], Path], ids: list[int]) -> Pack:
    """Samples by their numbers, counted through the shards, in the order of `ids`.

    Args:
        manifest: of the shards.
        fetch: where a shard is to be read; asked of those that have one of the samples.
        ids: the numbers.

    Raises:
        InputError: if one of those shards is missing or damaged.
    """
    wanted = set(ids)
    found: dict[int, tuple[NDArray[np.uint16], np.int64, str]] = {}
    for shard, begin in zip(manifest.shards, manifest.offsets, strict=True):
        if any(begin <= number < begin + shard.samples for number in wanted):
            rows = (row for pack in read_shard(fetch(shard)) for row in zip(*pack, strict=True))
            found |= {number: row for number, row in enumerate(rows, start=begin) if number in wanted}
    if wanted - found.keys():
        raise InputError(
            "a shard holds fewer samples than its manifest says: `lightning-mvar shards verify` says which"
        )
    tokens, labels, keys = zip(*(found[number] for number in ids), strict=True)
    return Pack(np.stack(tokens), np.array(labels), list(keys))


def records_of(folder: Path) -> list[Path]:
    """Files about shards that are finished and not yet in the manifest."""
    return sorted((folder / PARTS).glob("*.tar.json"))


def read_record(path: Path) -> Shard:
    return Shard(**json.loads(path.read_text()))


def save_record(folder: Path, shard: Shard) -> None:
    """Write down that a shard is finished."""
    with atomic_path(folder / PARTS / f"{shard.name}.json") as path:
        path.write_text(json.dumps(asdict(shard)) + "\n")


def shard_name(index: int) -> str:
    return f"{index:06d}.tar"


def write_shard(path: Path, tokens: NDArray[np.uint16], labels: NDArray[np.int64], keys: list[str]) -> Shard:
    """Write one shard of tokens (n, l) atomically; the bytes depend on the content alone.

    It is nobody else's to write: what a killed process has left of it is removed.
    """
    remove_unfinished(path)
    with atomic_path(path) as temporary:
        with wds.TarWriter(str(temporary), user="", group="", mtime=0.0) as writer:
            for begin in range(0, len(labels), PACK_SIZE):
                part = slice(begin, begin + PACK_SIZE)
                name = f"{path.stem}-{begin:06d}"
                arrays = {"tokens.npy": tokens[part], "labels.npy": labels[part], "keys.json": keys[part]}
                writer.write({"__key__": name, **arrays})
        return Shard(path.name, len(labels), temporary.stat().st_size, sha256_of(temporary))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_shard(path: Path) -> Iterator[Pack]:
    """Reads the packs of one shard.

    Only the three members of a pack are decoded, and arrays without pickle: a shard may come from anybody.

    Raises:
        InputError: if the file is missing, truncated or not a token shard, or has other members.
    """
    try:
        for name, members in read_packs(path):
            if strange := [member for member in members if member not in MEMBERS]:
                raise ValueError(f"it has {name}.{strange[0]}, which is not of a token shard")
            tokens, labels = (read_array(members[member]) for member in MEMBERS[:2])
            yield Pack(tokens, labels, json.loads(members["keys.json"]))
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is damaged or not a token shard ({reason}): remove it, and fetch it again by starting again where "
            f"it is from a cache, or else write it again with the same `lightning-mvar tokenize`"
        ) from error


def read_packs(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Reads the members of each pack, by what follows the first dot of their names, as WebDataset groups them."""
    with tarfile.open(path, "r:") as tar:
        for name, members in groupby(tar, key=lambda member: member.name.partition(".")[0]):
            yield name, {member.name.partition(".")[2]: read_member(tar, member) for member in members}


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file.read()


def read_array(data: bytes) -> NDArray[Any]:
    """Decodes an npy file; ValueError for one of Python objects."""
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array
