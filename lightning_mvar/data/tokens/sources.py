"""Sources of token shards: a local folder, or a remote one with a local cache.

    https://host/path                         also http://, s3://, gs:// and hf://
    pipe:rclone cat remote:bucket/shards/{}   a command that prints the file whose name replaces {}

A shard is downloaded once for all processes on a machine, checked against the manifest and cached atomically. Files in
the cache are named by SHA-256, so a changed shard gets a new file and identical shards from two places share one.
`verify` compares the SHA-256 of local and cached shards with the manifest's, because a bit flipped on the disk would
silently change a token or a label.

Nothing is evicted: every epoch reads every shard in a new random order, so a cache smaller than the set would have
misses in every epoch, and all of ImageNet takes only 1.8 GB at 256 px.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from lightning_mvar.data.tokens.manifest import MANIFEST, WRITERS, Manifest, Shard
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import (
    RETRIES,
    FetchError,
    check_scheme,
    download,
    download_to,
    is_remote,
    retry,
    wait_for_lock,
)
from lightning_mvar.io.fingerprint import sha256_of
from lightning_mvar.io.json_files import MAX_JSON_BYTES

SHARD_CACHE = "outputs/shard_cache"
MAX_THREADS = 8  # for verifying shards


class ShardSource(Protocol):
    """A source of shards; `str(source)` names it in messages."""

    def manifest(self) -> Manifest:
        """Reads the current manifest of a finished folder.

        Raises:
            InputError: if it cannot be read, or shards are missing.
        """

    def verify(self, shards: Sequence[Shard]) -> None:
        """Compares the SHA-256 of those shards that are on this machine with the manifest's.

        Raises:
            InputError: if a shard is damaged and cannot be downloaded again.
        """

    def fetch(self, shard: Shard, verify: bool = True) -> Path:
        """Returns a local file with this shard, by default after comparing its SHA-256 with the manifest's.

        Raises:
            InputError: if the shard is unavailable or damaged.
        """


class LocalShards:
    """Token shards in a folder on this machine, read in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> Manifest:
        manifest = Manifest.load(self.folder)
        manifest.check_files(self.folder)
        return manifest

    def verify(self, shards: Sequence[Shard]) -> None:
        for_each_shard(self.fetch, shards)

    def fetch(self, shard: Shard, verify: bool = True) -> Path:
        path = shard.path_in(self.folder)
        if verify and sha256_of(path) != shard.sha256:
            raise InputError(
                f"{path} is damaged: its SHA-256 is not the manifest's; copy it again, or run the same {WRITERS} "
                f"again; it rewrites only that shard"
            )
        return path


class RemoteShards:
    """Remote token shards, downloaded to a cache; see the module docstring.

    Args:
        location: URL of the folder, or a command with `{}` in place of the file name.
        cache_dir: local folder for the downloaded shards.
        retries: further attempts after a failure, with growing waits in between.

    Raises:
        InputError: if the scheme is not supported or the URL is invalid.
    """

    def __init__(self, location: str, cache_dir: Path, retries: int) -> None:
        check_scheme(location)
        if location.startswith("pipe:") and "{}" not in location:
            raise InputError(f"{location} does not name a file: put {{}} where its name belongs")
        self.location, self.cache_dir, self.retries = location, cache_dir, retries

    def __str__(self) -> str:
        return self.location

    def address(self, name: str) -> str:
        """Returns the URL or command for a file; a query, such as a signature, stays at the end."""
        if "{}" in self.location:
            return self.location.replace("{}", name)
        parts = urlsplit(self.location)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def manifest(self) -> Manifest:
        file = self.address(MANIFEST)
        manifest = Manifest.parse(retry(file, self.read_manifest, self.retries), file)
        manifest.check_finished(str(self), file)  # names and hashes end up in commands and paths
        return manifest

    def read_manifest(self) -> bytes:
        with TemporaryDirectory() as folder:
            download(self.address(MANIFEST), path := Path(folder) / MANIFEST, MAX_JSON_BYTES)
            data = path.read_bytes().strip()
        if not (data.startswith(b"{") and data.endswith(b"}")):  # a proxy's error page, or a truncated file
            raise FetchError(f"the response is not a manifest: it begins with {data[:40]!r}")
        return data

    def verify(self, shards: Sequence[Shard]) -> None:
        """Removes damaged shards from the cache, so that they are downloaded again."""

        def check(shard: Shard) -> None:
            if not self.is_cached(path := self.path_in_cache(shard), shard, verify=True):
                path.unlink(missing_ok=True)

        for_each_shard(check, shards)

    def path_in_cache(self, shard: Shard) -> Path:
        return self.cache_dir / f"{shard.sha256}.tar"

    def fetch(self, shard: Shard, verify: bool = True) -> Path:
        path = self.path_in_cache(shard)
        if not self.is_cached(path, shard, verify):
            with wait_for_lock(self.cache_dir / f".{shard.sha256}.lock"):
                if not self.is_cached(path, shard, verify):  # another process may have downloaded it meanwhile
                    address = self.address(shard.name)
                    retry(address, lambda: download_to(address, path, shard.bytes, shard.sha256), self.retries)
        return path

    def is_cached(self, path: Path, shard: Shard, verify: bool) -> bool:
        """Returns whether the cache has a shard with the right size and, if verified, content."""
        if not path.is_file() or path.stat().st_size != shard.bytes:
            return False
        return not verify or sha256_of(path) == shard.sha256


def for_each_shard(check: Callable[[Shard], object], shards: Sequence[Shard]) -> None:
    """Calls `check` for each shard in several threads; hashing releases Python's global lock."""
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for _ in tqdm(pool.map(check, shards), "verify", len(shards), unit="shard", leave=False, delay=1):
            pass


def open_shards(location: str, cache_dir: str | Path = SHARD_CACHE, retries: int = RETRIES) -> ShardSource:
    """Opens a local or remote folder of shards; see the module docstring."""
    if is_remote(location):
        return RemoteShards(location, Path(cache_dir).expanduser(), retries)
    return LocalShards(Path(location).expanduser())
