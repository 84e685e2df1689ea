"""Verification of a folder of token shards: reports every problem.

Training stops at the first damaged shard; this reader continues after each problem in order to report all of them.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.data.tokens.shards import (
    ARRAY_ERRORS,
    MANIFEST,
    MEMBERS,
    Manifest,
    Shard,
    read_array,
    read_packs,
    sha256_of,
    shard_name,
)
from lightning_mvar.errors import InputError

REWRITE = "run the same `lightning-mvar tokenize` again, it rewrites that shard only"
MEMBER_DTYPES = {"tokens.npy": np.dtype(np.uint16), "labels.npy": np.dtype(np.int64)}
TAR_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)


@dataclass(frozen=True)
class Problem:
    """A problem of one file with its remedy; `str(problem)` is one line."""

    file: Path
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.message.split())}; {self.remedy}"


@dataclass
class TokenSpec:
    """Properties that the manifest prescribes for the tokens and labels of every shard; None if unknown."""

    num_tokens: int | None = None
    vocab_size: int | None = None
    num_classes: int | None = None


@dataclass
class KeyIndex:
    """Maps each image key to the first shard that has it."""

    shard_of: dict[str, str] = field(default_factory=dict)

    def add(self, keys: list[str], name: str) -> Iterator[str]:
        """Adds the keys of shard `name` and yields a message for each shard, itself included, that repeats some."""
        repeated: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            first = self.shard_of.setdefault(key, name)
            if first != name:
                repeated[first].append(key)
        if own := [key for key, count in Counter(keys).items() if count > 1]:
            yield f"has {plural(len(own), 'key')} more than once, such as {own[0]!r}"
        for first, others in repeated.items():
            yield f"has {plural(len(others), 'key')} that {first} has too, such as {others[0]!r}"


def find_problems(
    folder: Path, tokenizer: str | None = None, advance: Callable[[int], object] = lambda _: None
) -> Iterator[Problem]:
    """Checks a folder of shards and yields each problem when it is found.

    Args:
        folder: folder of the shards.
        tokenizer: fingerprint that the manifest must have; None for any.
        advance: called with the size in bytes of each file that has been checked.

    Raises:
        InputError: if the folder does not exist, or has neither shards nor a manifest.
    """
    files = sorted(path.name for path in folder.glob("[!.]*.tar"))
    if not (files or (folder / MANIFEST).exists()):
        raise InputError(f"no token shards in {folder}: write them with `lightning-mvar tokenize`")
    try:
        manifest = Manifest.load(folder)
        problems = list(manifest_problems(manifest, folder, tokenizer))
        listed = {str(shard.name): shard for shard in manifest.shards}
        spec = token_spec(manifest)
    except InputError as error:
        problems, listed, spec = [Problem(folder / MANIFEST, str(error), "the shards are checked without it")], {}, None
    yield from problems
    key_index = KeyIndex()
    for name in sorted({*files, *listed}):
        path, shard = folder / name, listed.get(name)
        if shard is not None and not shard.is_file_name:
            yield Problem(folder / MANIFEST, f"lists a shard {name!r}, which is not a file name", "remove the folder")
            continue
        if shard is None and spec is not None:
            yield Problem(path, "is not listed in the manifest", "remove it, or restore the manifest that lists it")
        yield from shard_problems(path, shard, spec or TokenSpec(), key_index)
        advance(path.stat().st_size if path.is_file() else 0)


def is_count(value: Any, minimum: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def token_spec(manifest: Manifest) -> TokenSpec:
    """Returns what the manifest prescribes for every shard, with None for invalid values."""
    try:
        num_tokens = manifest.schedule.num_tokens
    except (InputError, TypeError, ValueError):
        num_tokens = None
    vocab_size = manifest.vocab_size if is_count(manifest.vocab_size, 1) else None
    names = manifest.class_names
    return TokenSpec(num_tokens, vocab_size, len(names) if isinstance(names, list) and names else None)


def manifest_problems(manifest: Manifest, folder: Path, tokenizer: str | None) -> Iterator[Problem]:
    """Yields the problems of a manifest's values and of its list of shards."""
    file, spec = folder / MANIFEST, token_spec(manifest)
    for name, value, valid in (
        ("side_lengths", manifest.side_lengths, spec.num_tokens),
        ("vocab_size", manifest.vocab_size, spec.vocab_size and spec.vocab_size <= 2**16),
        ("class_names", manifest.class_names, spec.num_classes),
        ("num_images", manifest.num_images, is_count(manifest.num_images)),
        ("views", manifest.views, is_count(manifest.views, 1)),
        ("shard_size", manifest.shard_size, is_count(manifest.shard_size, 1)),
        ("skipped", "not a mapping", all(isinstance(shard.skipped, dict) for shard in manifest.shards)),
    ):
        if not valid:
            yield Problem(file, f"{name} is {value!r}, which is invalid", "write the shards again into an empty folder")
    if tokenizer is not None and manifest.tokenizer != tokenizer:
        message = f"the tokens were made by tokenizer {manifest.tokenizer}, not by {tokenizer}"
        yield Problem(file, message, "pass the folder of their tokenizer as --tokenizer, or tokenize again")
    for name, count in Counter(str(shard.name) for shard in manifest.shards).items():
        if count > 1:
            yield Problem(file, f"lists {name} {count} times", "write the shards again into an empty folder")
    counts = (manifest.num_images, manifest.views, manifest.shard_size)
    if all(map(is_count, counts, (0, 1, 1))) and all(isinstance(shard.skipped, dict) for shard in manifest.shards):
        yield from count_problems(manifest, file)


def count_problems(manifest: Manifest, file: Path) -> Iterator[Problem]:
    """Yields a problem if the listed shards or samples do not add up to the number of images."""
    planned = {shard_name(index) for index in range(manifest.num_shards)}
    listed = {str(shard.name) for shard in manifest.shards}
    if missing := sorted(planned - listed):
        message = f"is unfinished: {len(listed)} of {len(planned)} shards, {missing[0]} is the first that is not listed"
        yield Problem(file, message, "run the same `lightning-mvar tokenize` again, it continues where it stopped")
    for name in sorted(listed - planned):
        message = f"lists {name}, but {manifest.num_images} images make {len(planned)} shards"
        yield Problem(file, message, "write the shards again into an empty folder")
    samples = sum(shard.samples for shard in manifest.shards if is_count(shard.samples))
    expected_samples = (manifest.num_images - len(manifest.skipped)) * manifest.views
    if samples != expected_samples and not missing:
        message = (
            f"{manifest.num_images} images minus {len(manifest.skipped)} skipped, in {manifest.views} views, are "
            f"{expected_samples} samples, but the listed shards have {samples}"
        )
        yield Problem(file, message, "write the shards again into an empty folder")


def shard_problems(path: Path, shard: Shard | None, spec: TokenSpec, key_index: KeyIndex) -> Iterator[Problem]:
    """Yields the problems of one file; `shard` is its manifest entry, None if it is not listed."""
    if not path.is_file():
        yield Problem(path, "is missing", REWRITE)
        return
    size = path.stat().st_size
    if shard is not None and size != shard.bytes:
        yield Problem(path, f"has {size} bytes, the manifest says {shard.bytes}", REWRITE)
    elif shard is not None and sha256_of(path) != shard.sha256:
        yield Problem(path, "does not have the SHA-256 that the manifest lists", REWRITE)
    check = ShardCheck(spec)
    try:
        for name, members in read_packs(path):
            check.add_pack(name, members)
    except TAR_ERRORS as error:
        check.messages.append(f"is not a complete tar file ({str(error) or type(error).__name__})")
    yield from (Problem(path, message, REWRITE) for message in check.messages)
    if shard is not None and check.samples != shard.samples:
        yield Problem(path, f"holds {check.samples} samples, the manifest says {shard.samples}", REWRITE)
    for message in key_index.add(check.keys, path.name):
        yield Problem(path, message, "remove the folder and tokenize again, or those images count twice")


class ShardCheck:
    """Checks the packs of one shard and collects messages, keys and the number of samples.

    Args:
        spec: properties that the manifest prescribes for every shard.
    """

    def __init__(self, spec: TokenSpec) -> None:
        self.spec = spec
        self.messages: list[str] = []
        self.keys: list[str] = []
        self.samples = 0

    def add_pack(self, pack: str, members: dict[str, bytes]) -> None:
        """Checks the members of one pack."""
        for name in MEMBERS:
            if name not in members:
                self.messages.append(f"pack {pack} has no {name}")
        if unknown := [name for name in members if name not in MEMBERS]:
            self.messages.append(f"pack {pack} has {', '.join(unknown)}, which does not belong in a token shard")
        tokens, labels = (self.parse_array(pack, name, members.get(name)) for name in MEMBER_DTYPES)
        keys = self.parse_keys(pack, members.get("keys.json"))
        counts = {name: len(v) for name, v in zip(MEMBERS, (tokens, labels, keys), strict=True) if v is not None}
        if len(set(counts.values())) > 1:
            self.messages.append(
                f"pack {pack} has unequal counts: {', '.join(f'{n} in {name}' for name, n in counts.items())}"
            )
        self.samples += min(counts.values(), default=0)
        self.keys += keys or []
        if tokens is not None:
            self.check_range(pack, "tokens", tokens, self.spec.vocab_size)
            length, expected = tokens.shape[1], self.spec.num_tokens
            if expected is not None and length != expected:
                self.messages.append(f"pack {pack} has {length} tokens per sample, the manifest's schedule {expected}")
        if labels is not None:
            self.check_range(pack, "labels", labels, self.spec.num_classes)

    def parse_array(self, pack: str, name: str, data: bytes | None) -> NDArray[Any] | None:
        """Returns a member as an array, None if its values cannot be checked; records a message if it is malformed."""
        if data is None:
            return None
        try:
            values = read_array(data)
        except ARRAY_ERRORS as error:
            self.messages.append(f"{pack}.{name} is not a numpy array ({error})")
            return None
        dtype, ndim = MEMBER_DTYPES[name], 2 if name == "tokens.npy" else 1
        if values.dtype != dtype or values.ndim != ndim:
            shape = f"{values.dtype} of shape {values.shape}"
            self.messages.append(f"{pack}.{name} is {shape}, not {dtype} of {ndim} dimension{'s' * (ndim > 1)}")
            return values if values.ndim == ndim and values.dtype.kind in "iu" else None
        return values

    def parse_keys(self, pack: str, data: bytes | None) -> list[str] | None:
        """Returns the keys of a pack; records a message and returns None if they are not a list of strings."""
        if data is None:
            return None
        try:
            values = json.loads(data)
        except ValueError as error:
            self.messages.append(f"{pack}.keys.json is not JSON ({error})")
            return None
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            self.messages.append(f"{pack}.keys.json is not a list of strings")
            return None
        return values

    def check_range(self, pack: str, name: str, values: NDArray[Any], end: int | None) -> None:
        """Records a message if values are outside [0, end)."""
        if end is None or not values.size:
            return
        wrong = np.argwhere((values < 0) | (values >= end))
        if len(wrong):
            row, value = wrong[0][0], values[tuple(wrong[0])]
            self.messages.append(
                f"pack {pack} has {len(wrong)} {name} outside [0, {end}), the first is {value} in sample {row}"
            )


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
