"""Verification of a folder of token shards.

Training stops at the first damaged shard; verification continues after each problem and reports them all.
"""

from __future__ import annotations

import os.path
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_mvar.data.tokens.manifest import MANIFEST, REWRITE_REMEDY, WRITERS, Manifest, Shard, shard_name
from lightning_mvar.data.tokens.packs import PACK_ERRORS, CheckedPack, TokenSpec, read_packs
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import sha256_of


@dataclass(frozen=True)
class Problem:
    """A problem of a file, and the remedy; `str(problem)` is one line."""

    file: Path
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.message.split())}; {self.remedy}"


@dataclass
class KeyIndex:
    """Maps each image key to the first shard that has it."""

    shard_of: dict[str, str] = field(default_factory=dict)

    def add(self, keys: list[str], name: str) -> Iterator[str]:
        """Adds the keys of shard `name`; yields a message for each shard, itself included, that shares some of them."""
        repeated: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            first = self.shard_of.setdefault(key, name)
            if first != name:
                repeated[first].append(key)
        if own := [key for key, count in Counter(keys).items() if count > 1]:
            yield f"has {counted(len(own), 'key')} more than once, such as {own[0]!r}"
        for first, others in repeated.items():
            yield f"has {counted(len(others), 'key')} that {first} has too, such as {others[0]!r}"


def find_problems(
    folder: Path, tokenizer: str | None = None, advance: Callable[[int], object] = lambda _: None
) -> Iterator[Problem]:
    """Checks a folder of shards and yields each problem as it is found.

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
        listed = {shard.name: shard for shard in manifest.shards}
        spec, command = manifest.spec, manifest.command
    except InputError as error:
        problems, listed, spec = [Problem(folder / MANIFEST, str(error), "shards are checked without it")], {}, None
        command = WRITERS
    yield from problems
    rewrite = f"run the same {command} again; it rewrites only that shard"
    key_index = KeyIndex()
    for name in sorted({*files, *listed}):
        path, shard = folder / name, listed.get(name)
        if shard is not None and not shard.is_file_name:
            continue  # reported with the manifest
        if shard is None and spec is not None:
            yield Problem(path, "is not listed in the manifest", "remove it, or restore the manifest that lists it")
        yield from shard_problems(path, shard, spec or TokenSpec(), key_index, rewrite)
        advance(path.stat().st_size if path.is_file() else 0)


def manifest_problems(manifest: Manifest, folder: Path, tokenizer: str | None) -> Iterator[Problem]:
    """Yields the problems of a manifest's values and of its list of shards."""
    file, invalid = folder / MANIFEST, list(manifest.invalid_values())
    for message, remedy in invalid or [*missing_shards(manifest), *manifest.impossible_counts()]:
        yield Problem(file, message, remedy)
    if tokenizer is not None and manifest.tokenizer != tokenizer:
        message = f"the tokens were made by tokenizer {manifest.tokenizer}, not by {tokenizer}"
        yield Problem(file, message, "pass the folder of their tokenizer as --tokenizer, or write them again")


def missing_shards(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yields message and remedy if the listed shards are not those expected for the number of images."""
    listed, count = {shard.name for shard in manifest.shards}, manifest.num_shards
    planned = {shard_name(index) for index in range(min(count, len(listed) + 1))}  # the first missing one is among them
    if missing := sorted(planned - listed):
        message = f"it is unfinished: {len(listed)} of {count} shards; {missing[0]} is the first that is not listed"
        yield message, f"run the same {manifest.command} again; it continues where it stopped"
    elif extra := sorted(listed - planned):
        yield f"it lists {extra[0]}, but {manifest.num_images} images make {count} shards", REWRITE_REMEDY


def shard_problems(
    path: Path, shard: Shard | None, spec: TokenSpec, key_index: KeyIndex, rewrite: str
) -> Iterator[Problem]:
    """Yields the problems of one file; `shard` is its manifest entry, None if it is not listed.

    `rewrite` is the remedy for a damaged file.
    """
    if not path.is_file():
        yield Problem(path, "is not a regular file" if os.path.lexists(path) else "is missing", rewrite)
        return
    size = path.stat().st_size
    if shard is not None and size != shard.bytes:
        yield Problem(path, f"has {size} bytes, but the manifest says {shard.bytes}", rewrite)
    elif shard is not None and sha256_of(path) != shard.sha256:
        yield Problem(path, "does not have the SHA-256 that the manifest lists", rewrite)
    samples, keys = 0, list[str]()
    try:
        for name, members in read_packs(path):
            pack = CheckedPack(name, members, spec)
            yield from (Problem(path, message, rewrite) for message in pack.messages)
            samples += pack.samples
            keys += pack.keys or []
    except PACK_ERRORS as error:
        yield Problem(path, f"is not a complete tar file ({str(error) or type(error).__name__})", rewrite)
    if shard is not None and samples != shard.samples:
        yield Problem(path, f"holds {samples} samples, but the manifest says {shard.samples}", rewrite)
    for message in key_index.add(keys, path.name):
        yield Problem(path, message, "remove the folder and write it again; otherwise those images count twice")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
