"""What is wrong with a folder of token shards: everything, not the first thing.

Training stops at the first damage; a reader that must name everything that is wrong goes on.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.data.tokens.shards import (
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

AGAIN = "run the same `lightning-mvar tokenize` again, it rewrites that shard only"
MEMBER_DTYPES = {"tokens.npy": np.dtype(np.uint16), "labels.npy": np.dtype(np.int64)}
TAR_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)
ARRAY_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TokenError,
    TypeError,
    OverflowError,
    MemoryError,
)  # of numpy


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, what it is, and what to do. As a string, one line."""

    file: Path
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.what.split())}; {self.remedy}"


@dataclass
class Expected:
    """What the manifest says of every shard; None where it cannot be told."""

    num_tokens: int | None = None
    vocab_size: int | None = None
    num_classes: int | None = None


@dataclass
class Seen:
    """The shard that each key was found in first."""

    shard_of: dict[str, str] = field(default_factory=dict)

    def repeated(self, keys: list[str], name: str) -> Iterator[str]:
        """What to say of the keys of shard `name` that were there before: a line for each shard that has them too."""
        twice: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            first = self.shard_of.setdefault(key, name)
            if first != name:
                twice[first].append(key)
        if own := [key for key, count in Counter(keys).items() if count > 1]:
            yield f"{counted(len(own), 'key')} more than once in it, such as {own[0]!r}"
        for first, others in twice.items():
            yield f"{counted(len(others), 'key')} in {first} too, such as {others[0]!r}"


def find_problems(
    folder: Path, tokenizer: str | None = None, advance: Callable[[int], object] = lambda _: None
) -> Iterator[Problem]:
    """Every problem of a folder of shards, as it is found.

    Args:
        folder: of the shards.
        tokenizer: fingerprint that the manifest is to have; None for any.
        advance: called with the bytes of each file that has been dealt with.

    Raises:
        InputError: if there is no such folder, or nothing of token shards in it.
    """
    files = sorted(path.name for path in folder.glob("[!.]*.tar"))
    if not (files or (folder / MANIFEST).exists()):
        raise InputError(f"no token shards in {folder}: write them with `lightning-mvar tokenize`")
    try:
        manifest = Manifest.load(folder)
        about = list(manifest_problems(manifest, folder, tokenizer))
        listed = {str(shard.name): shard for shard in manifest.shards}
        expected = expectations(manifest)
    except InputError as error:
        about, listed, expected = [Problem(folder / MANIFEST, str(error), "the shards are read without it")], {}, None
    yield from about
    seen = Seen()
    for name in sorted({*files, *listed}):
        path, shard = folder / name, listed.get(name)
        if shard is not None and not shard.is_file_name:
            yield Problem(folder / MANIFEST, f"lists a shard {name!r}, which is no file name", "remove the folder")
            continue
        if shard is None and expected is not None:
            yield Problem(path, "is not listed in the manifest", "remove it, or the manifest is another run's")
        yield from shard_problems(path, shard, expected or Expected(), seen)
        advance(path.stat().st_size if path.is_file() else 0)


def is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def expectations(manifest: Manifest) -> Expected:
    """What the manifest's own values allow to expect."""
    try:
        num_tokens = manifest.schedule.num_tokens
    except (InputError, TypeError, ValueError):
        num_tokens = None
    vocab_size = manifest.vocab_size if is_count(manifest.vocab_size, 1) else None
    names = manifest.class_names
    return Expected(num_tokens, vocab_size, len(names) if isinstance(names, list) and names else None)


def manifest_problems(manifest: Manifest, folder: Path, tokenizer: str | None) -> Iterator[Problem]:
    """What is wrong with the values of a manifest, and with what it lists."""
    file, expected = folder / MANIFEST, expectations(manifest)
    for name, value, good in (
        ("side_lengths", manifest.side_lengths, expected.num_tokens),
        ("vocab_size", manifest.vocab_size, expected.vocab_size and expected.vocab_size <= 2**16),
        ("class_names", manifest.class_names, expected.num_classes),
        ("num_images", manifest.num_images, is_count(manifest.num_images)),
        ("views", manifest.views, is_count(manifest.views, 1)),
        ("shard_size", manifest.shard_size, is_count(manifest.shard_size, 1)),
        ("skipped", "no mapping", all(isinstance(shard.skipped, dict) for shard in manifest.shards)),
    ):
        if not good:
            yield Problem(file, f"{name} is {value!r}, which cannot be", "write the shards again into an empty folder")
    if tokenizer is not None and manifest.tokenizer != tokenizer:
        what = f"the tokens are of tokenizer {manifest.tokenizer}, not of {tokenizer}"
        yield Problem(file, what, "name theirs with --tokenizer, or tokenize again")
    for name, count in Counter(str(shard.name) for shard in manifest.shards).items():
        if count > 1:
            yield Problem(file, f"lists {name} {count} times", "write the shards again into an empty folder")
    counts = (manifest.num_images, manifest.views, manifest.shard_size)
    if all(map(is_count, counts, (0, 1, 1))) and all(isinstance(shard.skipped, dict) for shard in manifest.shards):
        yield from count_problems(manifest, file)


def count_problems(manifest: Manifest, file: Path) -> Iterator[Problem]:
    """Whether the shards and samples listed are those that the images make."""
    planned = {shard_name(index) for index in range(manifest.num_shards)}
    listed = {str(shard.name) for shard in manifest.shards}
    if missing := sorted(planned - listed):
        what = f"is unfinished: {len(listed)} of {len(planned)} shards, {missing[0]} is the first that is not listed"
        yield Problem(file, what, "run the same `lightning-mvar tokenize` again, it continues where it stopped")
    for name in sorted(listed - planned):
        what = f"lists {name}, but {manifest.num_images} images make {len(planned)} shards"
        yield Problem(file, what, "write the shards again into an empty folder")
    samples = sum(shard.samples for shard in manifest.shards if is_count(shard.samples))
    left_out = (manifest.num_images - len(manifest.skipped)) * manifest.views - samples
    if left_out and not missing:
        what = (
            f"{manifest.num_images} images less {len(manifest.skipped)} skipped, {manifest.views} of each, are "
            f"{samples + left_out} samples, but the shards listed have {samples}"
        )
        yield Problem(file, what, "write the shards again into an empty folder")


def shard_problems(path: Path, shard: Shard | None, expected: Expected, seen: Seen) -> Iterator[Problem]:
    """What is wrong with one file; `shard` is what the manifest says of it, None where it is not listed."""
    if not path.is_file():
        yield Problem(path, "is missing", AGAIN)
        return
    size = path.stat().st_size
    if shard is not None and size != shard.bytes:
        yield Problem(path, f"has {size} bytes, the manifest says {shard.bytes}", AGAIN)
    elif shard is not None and sha256_of(path) != shard.sha256:
        yield Problem(path, "has another SHA-256 than the manifest says", AGAIN)
    reading = Reading(expected)
    try:
        for name, members in read_packs(path):
            reading.take(name, members)
    except TAR_ERRORS as error:
        reading.found.append(f"is no whole tar file ({str(error) or type(error).__name__})")
    yield from (Problem(path, what, AGAIN) for what in reading.found)
    if shard is not None and reading.samples != shard.samples:
        yield Problem(path, f"holds {reading.samples} samples, the manifest says {shard.samples}", AGAIN)
    for what in seen.repeated(reading.keys, path.name):
        yield Problem(path, what, "remove the folder and tokenize again: an image would count twice")


class Reading:
    """What has been read of one shard, and what is wrong with it.

    Args:
        expected: what the manifest says of every shard.
    """

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self.found: list[str] = []
        self.keys: list[str] = []
        self.samples = 0

    def take(self, pack: str, members: dict[str, bytes]) -> None:
        """Judge one pack."""
        for name in MEMBERS:
            if name not in members:
                self.found.append(f"pack {pack} has no {name}")
        if strange := [name for name in members if name not in MEMBERS]:
            self.found.append(f"pack {pack} has {', '.join(strange)}, which is not of a token shard")
        tokens, labels = (self.array(pack, name, members.get(name)) for name in MEMBER_DTYPES)
        keys = self.names(pack, members.get("keys.json"))
        counts = {name: len(v) for name, v in zip(MEMBERS, (tokens, labels, keys), strict=True) if v is not None}
        if len(set(counts.values())) > 1:
            self.found.append(f"pack {pack} is of {', '.join(f'{n} in {name}' for name, n in counts.items())}")
        self.samples += min(counts.values(), default=0)
        self.keys += keys or []
        if tokens is not None:
            self.check_range(pack, "tokens", tokens, self.expected.vocab_size)
            width, wanted = tokens.shape[1], self.expected.num_tokens
            if wanted is not None and width != wanted:
                self.found.append(f"pack {pack} has {width} tokens a sample, the manifest's schedule {wanted}")
        if labels is not None:
            self.check_range(pack, "labels", labels, self.expected.num_classes)

    def array(self, pack: str, name: str, data: bytes | None) -> NDArray[Any] | None:
        """A member of the right type and number of dimensions; None, and what is wrong, otherwise."""
        if data is None:
            return None
        try:
            values = read_array(data)
        except ARRAY_ERRORS as error:
            self.found.append(f"{pack}.{name} is not a numpy array ({error})")
            return None
        dtype, ndim = MEMBER_DTYPES[name], 2 if name == "tokens.npy" else 1
        if values.dtype != dtype or values.ndim != ndim:
            shape = f"{values.dtype} of shape {values.shape}"
            self.found.append(f"{pack}.{name} is {shape}, not {dtype} of {ndim} dimension{'s' * (ndim > 1)}")
            return values if values.ndim == ndim and values.dtype.kind in "iu" else None
        return values

    def names(self, pack: str, data: bytes | None) -> list[str] | None:
        """The keys of a pack; None, and what is wrong, where they are none."""
        if data is None:
            return None
        try:
            values = json.loads(data)
        except ValueError as error:
            self.found.append(f"{pack}.keys.json is not JSON ({error})")
            return None
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            self.found.append(f"{pack}.keys.json is not a list of strings")
            return None
        return values

    def check_range(self, pack: str, what: str, values: NDArray[Any], end: int | None) -> None:
        """Find values outside [0, end)."""
        if end is None or not values.size:
            return
        wrong = np.argwhere((values < 0) | (values >= end))
        if len(wrong):
            row, value = wrong[0][0], values[tuple(wrong[0])]
            self.found.append(
                f"pack {pack} has {len(wrong)} {what} outside [0, {end}), the first is {value} in sample {row}"
            )


def counted(count: int, what: str) -> str:
    return f"{count} {what} is" if count == 1 else f"{count} {what}s are"
