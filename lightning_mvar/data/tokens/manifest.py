"""The manifest of a folder of token shards: a description of the tokens, and the list of shards.

While processes write a folder, `parts/` holds one record per finished shard; at the end, the records are moved into the
manifest. The manifest also states what a network must match: schedule, vocabulary, classes and the tokenizer's
fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os.path
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

from lightning_mvar.data.images.protocols import MARGIN, MAX_MARGIN
from lightning_mvar.data.tokens.packs import TokenSpec
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import read_regular
from lightning_mvar.io.fingerprint import sha256_of
from lightning_mvar.io.json_files import MAX_JSON_BYTES, FormatVersion, parse_json, read_json, write_json
from lightning_mvar.scales import ScaleSchedule, Shape

FORMAT_VERSION = 3
FORMAT = FormatVersion(FORMAT_VERSION, "another release wrote it")
MANIFEST = "manifest.json"
PARTS = "parts"  # subfolder with a record per finished shard
SAMPLED = "samples of a network: "  # prefix of the source of tokens that a network drew; `NAME=VALUE` pairs follow
MAX_TOKENS = 2**20  # per image; 1024 pixels have 9,451
MAX_COUNT = 2**40
TOKENIZE, SAMPLE = "`lightning-mvar tokenize`", "`lightning-mvar sample`"  # commands that write shards, for messages
WRITERS = f"{TOKENIZE} or {SAMPLE}"
REMOVE_REMEDY = f"remove that file and run the same {WRITERS} again"
REWRITE_REMEDY = "write the shards again into an empty folder"


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
        return re.fullmatch(r"\w[\w.-]{0,199}", self.name, re.ASCII) is not None

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

    def is_possible(self, num_tokens: int) -> bool:
        """Returns whether its bytes can hold its samples of `num_tokens` each, and its checksum has the right form."""
        return 0 <= self.samples <= self.bytes // (2 * num_tokens) and bool(re.fullmatch("[0-9a-f]{64}", self.sha256))


@dataclass
class Manifest:
    """The contents of a folder of shards.

    Args:
        side_lengths: schedule of the tokens.
        vocab_size: number of codes; tokens are in [0, vocab_size).
        class_names: class names in label order.
        tokenizer: fingerprint of the tokenizer that encoded the images.
        source: location of the images, or `SAMPLED` followed by the network that drew the tokens and its settings.
        num_images: number of images in the source.
        shard_size: samples per shard, fewer in the last one; skipped images count.
        order: hash of the order in which the images are assigned to shards.
        listing: hash of the images' names and labels, or of the source of samples.
        views: samples per image: random crops, or the center crop if 1.
        seed: seed of the random crops.
        flips: whether half of the random crops are mirrored.
        margin: ratio of the resized shorter side of images to their crops.
        precision: precision of the encoder, or of the network that drew the tokens.
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
    margin: float = MARGIN
    precision: str = "float32"
    shards: list[Shard] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def schedule(self) -> ScaleSchedule:
        """Schedule of the tokens; raises InputError if the side lengths are invalid."""
        return ScaleSchedule(tuple(self.side_lengths))

    @property
    def sampling(self) -> dict[str, str] | None:
        """The settings, by name, with which a network drew the tokens; None for tokens of images."""
        return sampling_settings(self.source)

    @property
    def command(self) -> str:
        """The command that writes such shards, for messages."""
        return TOKENIZE if self.sampling is None else SAMPLE

    @property
    def spec(self) -> TokenSpec:
        """Properties that every shard must have, None where the manifest's value is invalid."""
        try:
            num_tokens = self.schedule.num_tokens
        except InputError:
            num_tokens = 0
        return TokenSpec(
            num_tokens if 1 <= num_tokens <= MAX_TOKENS else None,
            self.vocab_size if 1 <= self.vocab_size <= 2**16 else None,
            len(self.class_names) or None,
        )

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

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the location of the images."""
        return hashlib.sha256(json.dumps(asdict(self) | {"source": ""}).encode()).hexdigest()

    def failures(self) -> dict[str, str]:
        """Returns one message per unreadable image, by image key."""
        return {key: message for shard in self.shards for key, message in shard.skipped.items()}

    def same_run(self, other: Manifest) -> bool:
        """Returns whether both have the same images, wherever stored, tokenizer, options and division into shards."""
        own, others = asdict(self), asdict(other)
        return all(own[key] == others[key] for key in own if key not in ("shards", "source"))

    def save(self, folder: Path) -> None:
        """Writes the manifest, which must include the records of `parts`, and removes them."""
        write_json(folder / MANIFEST, asdict(self), indent=1)
        if (parts := parts_of(folder)).is_dir():
            shutil.rmtree(parts)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads the manifest of `folder`, updated with the records of shards finished since it was written.

        Raises:
            InputError: if it is missing, damaged or has another format version.
        """
        path = folder / MANIFEST
        if not os.path.exists(path):  # False for a name that is too long
            raise InputError(
                f"no token shards in {folder}: {path} does not exist; write them with `lightning-mvar tokenize`"
            )
        return cls.parse(read_regular(path, MAX_JSON_BYTES), str(path), record_paths(folder))

    @classmethod
    def parse(cls, data: bytes, location: str, records: Sequence[Path] = ()) -> Manifest:
        """Parses the manifest at `location`, updated with the records of shards finished since it was written.

        Only types are checked; see `check_finished`.

        Raises:
            InputError: if it is damaged or has another format version.
        """
        try:
            manifest = parse_json(data, cls, MANIFEST, FORMAT)
        except InputError as error:
            raise InputError(f"{location} is damaged ({error}); {REMOVE_REMEDY}") from error
        newer = [read_record(path) for path in records]
        names = {shard.name for shard in newer}
        shards = [shard for shard in manifest.shards if shard.name not in names]
        manifest.shards = sorted(shards + newer, key=lambda shard: shard.name)
        return manifest

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
                    f"the model; set the model's to match, or write the shards again with the model's tokenizer"
                )

    def check_tokenizer(self, location: object, fingerprint: str) -> None:
        """Raises InputError unless the tokenizer with this fingerprint made the tokens at `location`."""
        if self.tokenizer != fingerprint:
            raise InputError(
                f"the tokens in {location} were made by tokenizer {self.tokenizer}, not by {fingerprint}: pass the "
                f"folder of their tokenizer as --tokenizer"
            )

    def check_classes(self, location: object, class_names: Sequence[str]) -> None:
        """Checks that a network has the same classes in the same order.

        Args:
            location: names the shards in messages.
            class_names: the network's class names in label order; ignored if they are the labels themselves.

        Raises:
            InputError: naming the first class that differs.
        """
        if list(class_names) == [str(label) for label in range(len(class_names))]:
            return  # the network was trained on labels without names
        remedy = f"{'tokenize images' if self.sampling is None else 'sample tokens'} of the model's classes"
        if len(class_names) != len(self.class_names):
            raise InputError(
                f"the shards in {location} have {len(self.class_names)} classes, the model has "
                f"{len(class_names)}: {remedy}"
            )
        for label, (ours, theirs) in enumerate(zip(self.class_names, class_names, strict=True)):
            if ours != theirs:
                raise InputError(
                    f"the shards in {location} do not fit the model: class {label} is {ours!r:.80} in the shards and "
                    f"{theirs!r:.80} in the model; {remedy}"
                )

    def invalid_values(self) -> Iterator[tuple[str, str]]:
        """Yields message and remedy for each invalid value."""
        spec = self.spec
        for name, value, valid in (
            ("side_lengths", self.side_lengths, spec.num_tokens),
            ("vocab_size", self.vocab_size, spec.vocab_size),
            ("class_names", self.class_names, spec.num_classes),
            ("tokenizer", self.tokenizer, re.fullmatch(r"[\w.-]{1,128}", self.tokenizer, re.ASCII)),
            ("num_images", self.num_images, 0 <= self.num_images <= MAX_COUNT),
            ("views", self.views, 1 <= self.views <= MAX_COUNT),
            ("shard_size", self.shard_size, 1 <= self.shard_size <= MAX_COUNT),
            ("seed", self.seed, self.seed >= 0),
            ("margin", self.margin, 1 <= self.margin <= MAX_MARGIN),
        ):
            if not valid:
                yield f"{name} is {value!r:.80}, which is invalid", REWRITE_REMEDY
        for shard in self.shards:
            if not shard.is_file_name:
                yield f"it lists a shard {shard.name!r:.80}, which is not a file name", "remove the folder"
            elif spec.num_tokens and not shard.is_possible(spec.num_tokens):
                samples = f"{shard.samples} samples in {shard.bytes} bytes"
                yield (
                    f"it lists a shard {shard.name!r} with {samples} and the SHA-256 {shard.sha256!r:.70}",
                    REWRITE_REMEDY,
                )

    def impossible_counts(self) -> Iterator[tuple[str, str]]:
        """Yields message and remedy if shards are listed twice or samples do not add up; all values must be valid."""
        for name, count in Counter(shard.name for shard in self.shards).items():
            if count > 1:
                yield f"it lists {name} {count} times", REWRITE_REMEDY
        expected = (self.num_images - len(self.skipped)) * self.views
        if self.num_samples != expected and len(self.shards) >= self.num_shards:
            yield (
                f"{self.num_images} images minus {len(self.skipped)} skipped, in {self.views} views, are {expected} "
                f"samples, but the listed shards have {self.num_samples}",
                REWRITE_REMEDY,
            )

    def check_finished(self, location: object, file: object) -> None:
        """Checks that the manifest is valid and lists every shard.

        Args:
            location: names the shards in messages.
            file: names the manifest.

        Raises:
            InputError: with the first problem.
        """
        for message, remedy in self.invalid_values():
            raise InputError(f"{file} is damaged: {message}; {remedy}")
        if len(self.shards) < self.num_shards:
            raise InputError(
                f"{location} is unfinished: {len(self.shards)} of {self.num_shards} shards; run the same "
                f"{self.command} again; it continues where it stopped"
            )
        for message, remedy in self.impossible_counts():
            raise InputError(f"{file} is damaged: {message}; {remedy}")

    def check_files(self, folder: Path) -> None:
        """Raises InputError unless every shard is listed and its file has the listed size."""
        self.check_finished(folder, folder / MANIFEST)
        for shard in self.shards:
            path = shard.path_in(folder)
            if not path.is_file():
                problem = "missing, or not a regular file"
            elif (size := path.stat().st_size) != shard.bytes:
                problem = f"truncated or altered: it has {size} bytes, but the manifest says {shard.bytes}"
            else:
                continue
            raise InputError(f"{path} is {problem}; run the same {self.command} again; it rewrites only that shard")


def sampling_settings(source: str) -> dict[str, str] | None:
    """Parses the settings of tokens that a network drew from the `source` of their manifest; None for images."""
    if not source.startswith(SAMPLED):
        return None
    pairs = (pair.partition("=") for pair in source.removeprefix(SAMPLED).split())
    return {name: value for name, _, value in pairs}


def parts_of(folder: Path) -> Path:
    """Returns the folder of the records, which may not exist.

    Raises:
        InputError: if it is a link, which may lead elsewhere, or not a folder.
    """
    parts = folder / PARTS
    if parts.is_symlink() or (parts.exists() and not parts.is_dir()):
        raise InputError(f"{parts} must be a folder: remove it and run the same {WRITERS} again")
    return parts


def record_paths(folder: Path) -> list[Path]:
    """Returns the record files of finished shards that have not been moved into the manifest."""
    return sorted(parts_of(folder).glob("*.tar.json"))


def read_record(path: Path) -> Shard:
    try:
        return read_json(path, Shard)
    except InputError as error:
        raise InputError(f"{error}; {REMOVE_REMEDY}") from error


def save_record(folder: Path, shard: Shard) -> None:
    """Atomically records that a shard is finished."""
    write_json(parts_of(folder) / f"{shard.name}.json", asdict(shard), indent=None)


def shard_name(index: int) -> str:
    return f"{index:06d}.tar"
