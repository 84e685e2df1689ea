"""Token shard format: the manifest, writing and reading.

A folder of shards holds `manifest.json` and tar files in the WebDataset format, readable with plain `webdataset`. Each
tar sample is a pack of up to `PACK_SIZE` images, so that a reader slices arrays instead of running Python per image:

    KEY.tokens.npy   (n, l) uint16     all scales packed, coarse to fine
    KEY.labels.npy   (n,) int64        class of each image
    KEY.keys.json    n strings         source path or name of each image

Shards are written atomically. While any number of processes write a folder, `parts/` holds one record per finished
shard; at the end the records are moved into the manifest. The manifest also states what a network must match: schedule,
vocabulary, classes and the tokenizer's fingerprint.
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
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, remove_unfinished
from lightning_mvar.scales import ScaleSchedule, Shape

FORMAT_VERSION = 3
PACK_SIZE = 512  # images per tar sample: 0.7 MB at 680 tokens
MANIFEST = "manifest.json"
MEMBERS = ("tokens.npy", "labels.npy", "keys.json")  # of each pack
PARTS = "parts"  # subfolder with a record per finished shard
# Raised by numpy for a damaged or forged npy file.
ARRAY_ERRORS = (OSError, EOFError, ValueError, SyntaxError, TokenError, TypeError, OverflowError, MemoryError)


class Pack(NamedTuple):
    """Consecutive images of a shard."""

    tokens: NDArray[np.uint16]  # (n, l)
    labels: NDArray[np.int64]  # (n,)
    keys: list[str]


@dataclass
class Shard:
    """A manifest entry of one finished shard; `skipped` maps the key of each unreadable image to its error message."""

    name: str
    samples: int
    bytes: int
    sha256: str
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def is_file_name(self) -> bool:
        """Whether the name is a plain file name, without a path."""
        return isinstance(self.name, str) and re.fullmatch(r"\w[\w.-]*", self.name) is not None

    def path_in(self, folder: Path) -> Path:
        """Returns the path of the shard in a folder.

        Raises:
            InputError: if the name is not a plain file name: manifests are untrusted.
        """
        if not self.is_file_name:
            raise InputError(
                f"{folder / MANIFEST} is damaged: it lists a shard {self.name!r}, which is not a file name"
            )
        return folder / self.name

    def is_intact(self, folder: Path) -> bool:
        path = self.path_in(folder)
        return path.is_file() and path.stat().st_size == self.bytes and sha256_of(path) == self.sha256


@dataclass
class Manifest:
    """The contents of a folder of shards.

    Args:
        side_lengths: schedule of the tokens.
        vocab_size: number of codes; tokens are in [0, vocab_size).
        class_names: class names in label order.
        tokenizer: fingerprint of the tokenizer that encoded the images.
        source: location of the images.
        num_images: number of images in the source.
        shard_size: samples per shard, fewer in the last one; skipped images count.
        order: hash of the order in which the images went into the shards.
        listing: hash of the images' names and labels.
        views: samples per image: random crops, or the centre crop if 1.
        seed: seed of the random crops.
        flips: whether half of the random crops are mirrored.
        precision: precision of the encoder.
        shards: finished shards, in order.
        format_version: version of this format.
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
        """Schedule of the tokens; raises InputError if the side lengths are invalid."""
        return ScaleSchedule(tuple(self.side_lengths))

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def skipped(self) -> list[str]:
        """One message per unreadable image, regardless of the number of views."""
        return list(self.failures().values())

    @property
    def offsets(self) -> list[int]:
        """Global index of the first sample of each shard."""
        return [0, *accumulate(shard.samples for shard in self.shards)][:-1]

    @property
    def num_shards(self) -> int:
        """Number of shards in a finished folder."""
        return -(-self.num_images * self.views // self.shard_size)

    def failures(self) -> dict[str, str]:
        """Returns one message per unreadable image, by image key."""
        return {key: message for shard in self.shards for key, message in shard.skipped.items()}

    def same_run(self, other: Manifest) -> bool:
        """Whether both describe the same images, wherever stored, tokenizer, options and split into shards."""
        own, others = asdict(self), asdict(other)
        return all(own[key] == others[key] for key in own if key not in ("shards", "source"))

    def save(self, folder: Path) -> None:
        """Writes the manifest, which must include the records of `parts`, and removes them."""
        with atomic_path(folder / MANIFEST) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        if (folder / PARTS).is_dir():
            shutil.rmtree(folder / PARTS)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads the manifest of `folder`, updated with the records of shards finished since it was written.

        Raises:
            InputError: if it is missing, damaged or of another format version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(
                f"no token shards in {folder}: {path} does not exist; write them with `lightning-mvar tokenize`"
            )
        return cls.parse(path.read_text(errors="replace"), str(path), record_paths(folder))

    @classmethod
    def parse(cls, text: str, location: str, records: Sequence[Path] = ()) -> Manifest:
        """Parses the text of the manifest at `location`, updated with the records of shards finished since.

        Raises:
            InputError: if it is damaged or of another format version.
        """
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise InputError(
                    f"{location} has format version {version}; this release reads {FORMAT_VERSION}: tokenize again"
                )
            newer = [read_record(path) for path in records]
            names = {shard.name for shard in newer}
            shards = [Shard(**shard) for shard in values["shards"] if shard["name"] not in names]
            values["shards"] = sorted(shards + newer, key=lambda shard: shard.name)
            values["side_lengths"] = [tuple(s) if isinstance(s, list) else s for s in values["side_lengths"]]
            return cls(**values)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{location}, or a file in {PARTS} next to it, is damaged ({error!r}); remove that file and run the "
                f"same `lightning-mvar tokenize` again"
            ) from error

    def check_model(
        self, location: object, side_lengths: tuple[int | Shape, ...], vocab_size: int, num_classes: int, tokenizer: str
    ) -> None:
        """Raises InputError unless a network with these properties fits the shards at `location`."""
        for name, ours, theirs in (
            ("side_lengths", list(self.side_lengths), list(side_lengths)),
            ("vocab_size", self.vocab_size, vocab_size),
            ("num_classes", len(self.class_names), num_classes),
            ("tokenizer fingerprint", self.tokenizer, tokenizer),
        ):
            if ours != theirs:
                raise InputError(
                    f"the shards in {location} do not fit the model: {name} is {ours} in the shards and {theirs} in "
                    f"the model; set the model's to match, or tokenize again with the model's tokenizer"
                )

    def check_finished(self, location: object) -> None:
        """Raises InputError unless every shard is listed."""
        if len(self.shards) < self.num_shards:
            raise InputError(
                f"{location} is unfinished: {len(self.shards)} of {self.num_shards} shards; run the same "
                f"`lightning-mvar tokenize` again, it continues where it stopped"
            )

    def check_files(self, folder: Path) -> None:
        """Raises InputError unless every shard is listed and its file has the listed size."""
        self.check_finished(folder)
        for shard in self.shards:
            path = shard.path_in(folder)
            size = path.stat().st_size if path.is_file() else 0
            if size != shard.bytes:
                raise InputError(
                    f"{path} is {'missing' if not size else f'truncated or altered: {size} bytes'}, the manifest says "
                    f"{shard.bytes}; run the same `lightning-mvar tokenize` again, it rewrites that shard only"
                )


def read_samples(manifest: Manifest, fetch: Callable[[Shard], Path], ids: list[int]) -> Pack:
    """Reads samples by their global index, in the order of `ids`.

    Args:
        manifest: manifest of the shards.
        fetch: returns a local file for a shard; called only for shards with one of the samples.
        ids: indices counted through all shards.

    Raises:
        InputError: if one of those shards is missing or damaged.
    """
    requested = set(ids)
    rows_by_id: dict[int, tuple[NDArray[np.uint16], np.int64, str]] = {}
    for shard, begin in zip(manifest.shards, manifest.offsets, strict=True):
        if any(begin <= index < begin + shard.samples for index in requested):
            rows = (row for pack in read_shard(fetch(shard)) for row in zip(*pack, strict=True))
            rows_by_id |= {index: row for index, row in enumerate(rows, start=begin) if index in requested}
    if requested - rows_by_id.keys():
        raise InputError(
            "a shard holds fewer samples than its manifest says; find it with `lightning-mvar shards verify`"
        )
    tokens, labels, keys = zip(*(rows_by_id[index] for index in ids), strict=True)
    return Pack(np.stack(tokens), np.array(labels), list(keys))


def record_paths(folder: Path) -> list[Path]:
    """Returns the record files of finished shards that are not in the manifest yet."""
    return sorted((folder / PARTS).glob("*.tar.json"))


def read_record(path: Path) -> Shard:
    return Shard(**json.loads(path.read_text()))


def save_record(folder: Path, shard: Shard) -> None:
    """Records atomically that a shard is finished."""
    with atomic_path(folder / PARTS / f"{shard.name}.json") as path:
        path.write_text(json.dumps(asdict(shard)) + "\n")


def shard_name(index: int) -> str:
    return f"{index:06d}.tar"


def write_shard(path: Path, tokens: NDArray[np.uint16], labels: NDArray[np.int64], keys: list[str]) -> Shard:
    """Writes one shard of tokens (n, l) atomically; its bytes depend only on the content.

    The caller must be its only writer: temporary files that a killed process left behind are removed.
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

    Only the three members of a pack are decoded, and arrays without pickle: shards are untrusted.

    Raises:
        InputError: if the file is missing, truncated or not a token shard, or has other members.
    """
    try:
        for name, members in read_packs(path):
            if unknown := [member for member in members if member not in MEMBERS]:
                raise ValueError(f"it has {name}.{unknown[0]}, which does not belong in a token shard")
            tokens, labels = (read_array(members[member]) for member in MEMBERS[:2])
            yield Pack(tokens, labels, json.loads(members["keys.json"]))
    except (*ARRAY_ERRORS, KeyError, RecursionError, tarfile.TarError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is damaged or not a token shard ({reason}): remove it, then restart if it is in a cache (it is "
            f"downloaded again), or else rewrite it with the same `lightning-mvar tokenize`"
        ) from error


def read_packs(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields each pack's name and its members by extension, split at the first dot of the file's name as in WebDataset.

    Raises:
        ValueError: if a pack has two members of one name.
    """
    with tarfile.open(path, "r:") as tar:
        for name, members in groupby(tar, key=lambda member: split_name(member.name)[0]):
            pack: dict[str, bytes] = {}
            for member in members:
                if (extension := split_name(member.name)[1]) in pack:
                    raise ValueError(f"it has {member.name} twice")
                pack[extension] = read_member(tar, member)
            yield name, pack


def split_name(path: str) -> tuple[str, str]:
    """Splits a member's path at the first dot of its file name."""
    folder, slash, name = path.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a regular file")
    return file.read()


def read_array(data: bytes) -> NDArray[Any]:
    """Decodes an npy file; raises ValueError if it holds Python objects."""
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array
