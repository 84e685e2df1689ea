"""Where token shards are read from: a folder here, or anything that webdataset's `gopen` reads, through a cache.

    https://host/path                         also http://, gs://, hf:// and what else webdataset knows
    pipe:aws s3 cp s3://bucket/shards/{} -    a command that prints the file whose name is put for {}

A shard is downloaded once for all processes of a machine, checked against the manifest, and appears in the cache whole
or not at all. It goes there by its SHA-256: shards that have changed have another name, and the same ones of two places
are one file. Nothing is ever removed. A bound would not pay: every epoch reads every shard, in an order of its own, so
that a cache smaller than the set would miss about as often as it is too small, and all of ImageNet is 1.7 GB at 256 px.
"""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from lightning_mvar.data.tokens.shards import MANIFEST, Manifest, Shard
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import FetchError, alone, check_scheme, is_remote, persist, receive
from lightning_mvar.io.files import atomic_path, remove_unfinished

SHARD_CACHE = "outputs/shard_cache"


class ShardSource(Protocol):
    """A place that shards are read from. As a string, its name for messages."""

    def manifest(self) -> Manifest:
        """The manifest of a finished folder, as it is now.

        Raises:
            InputError: if it cannot be read, or shards are missing.
        """

    def fetch(self, shard: Shard) -> Path:
        """A file with this shard.

        Raises:
            InputError: if it is not to be had.
        """


class LocalShards:
    """A folder on this machine, read where it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> Manifest:
        manifest = Manifest.load(self.folder)
        manifest.check_files(self.folder)
        return manifest

    def fetch(self, shard: Shard) -> Path:
        return shard.path_in(self.folder)


class RemoteShards:
    """Shards elsewhere; see above.

    Args:
        where: URL of the folder, or a command with `{}` for the file's name.
        cache_dir: folder on this machine that keeps them.
        retries: attempts after one that failed, with growing waits between.

    Raises:
        InputError: if webdataset cannot read from there.
    """

    def __init__(self, where: str, cache_dir: Path, retries: int) -> None:
        check_scheme(where)
        if where.startswith("pipe:") and "{}" not in where:
            raise InputError(f"{where} does not say which file: put {{}} where its name belongs")
        self.where, self.cache_dir, self.retries = where, cache_dir, retries

    def __str__(self) -> str:
        return self.where

    def address(self, name: str) -> str:
        """URL or command of a file; a query, such as a signature, stays at the end."""
        if "{}" in self.where:
            return self.where.replace("{}", name)
        parts = urlsplit(self.where)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def manifest(self) -> Manifest:
        text = persist(self.address(MANIFEST), self.read_manifest, self.retries)
        manifest = Manifest.parse(text, self.address(MANIFEST))
        manifest.check_finished(str(self))
        for shard in manifest.shards:  # names go into commands and paths
            shard.path_in(self.cache_dir)
            if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
                raise InputError(f"{self.address(MANIFEST)} is damaged: it lists a shard {shard.name!r}")
        return manifest

    def read_manifest(self) -> str:
        file = BytesIO()
        receive(self.address(MANIFEST), file)
        text = file.getvalue().decode(errors="replace")
        try:
            json.loads(text)
        except ValueError as error:
            raise FetchError(f"what came is not JSON: {error}") from error
        return text

    def fetch(self, shard: Shard) -> Path:
        path = self.cache_dir / f"{shard.sha256}.tar"
        if not is_whole(path, shard):
            with alone(self.cache_dir / f".{shard.sha256}.lock"):
                if not is_whole(path, shard):  # which another process may have mended meanwhile
                    persist(self.address(shard.name), lambda: self.download(shard, path), self.retries)
        return path

    def download(self, shard: Shard, path: Path) -> None:
        remove_unfinished(path)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            size, digest = receive(self.address(shard.name), file)
            if size != shard.bytes:
                raise FetchError(f"{size} bytes came, the manifest says {shard.bytes}")
            if digest != shard.sha256:
                raise FetchError("what came has another SHA-256 than the manifest says")


def open_shards(where: str, cache_dir: str | Path = SHARD_CACHE, retries: int = 5) -> ShardSource:
    """The place that `where` names: a folder, or see above."""
    if is_remote(where):
        return RemoteShards(where, Path(cache_dir), retries)
    return LocalShards(Path(where))


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether the cache has a shard; what is under its name was checked before it got it."""
    return path.is_file() and path.stat().st_size == shard.bytes
