"""Where token shards are read from: a folder here, or anything that webdataset's `gopen` reads, through a cache.

    https://host/path                         also http://, gs://, hf:// and what else webdataset knows
    pipe:aws s3 cp s3://bucket/shards/{} -    a command that prints the file whose name is put for {}

A shard is downloaded once for all processes of a machine, checked against the manifest, and appears in the cache whole
or not at all. It goes there by its SHA-256: shards that have changed have another name, and the same ones of two places
are one file. Nothing is ever removed. A bound would not pay: every epoch reads every shard, in an order of its own, so
that a cache smaller than the set would miss about as often as it is too small, and all of ImageNet is 1.7 GB at 256 px.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from select import POLLIN, poll
from subprocess import TimeoutExpired
from time import sleep
from typing import BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from webdataset.gopen import gopen, gopen_schemes

from lightning_mvar.data.shards import MANIFEST, Manifest, Shard
from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path
from lightning_mvar.locks import FileLock

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between attempts, doubling
STALL_S = 120.0  # without a byte: longer than curl's own retries, which webdataset asks for, take to give up
POLL_S = 0.1
CHUNK = 2**18  # bytes
REASONS = {  # curl's exit codes
    6: "the host is unknown",
    7: "the host cannot be reached",
    18: "the connection broke off",
    22: "the server answered with an error, such as 404",
    28: "the host did not answer in time",
    35: "no secure connection",
    52: "the server sent nothing",
    56: "the connection broke off",
    60: "the certificate is not trusted",
}

log = logging.getLogger(__name__)
T = TypeVar("T")


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
        return self.folder / shard.name


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
        scheme = where.partition(":")[0]
        if scheme not in gopen_schemes:
            raise InputError(
                f"{where}: webdataset does not read {scheme}://; name a command that does, such as "
                f"'pipe:aws s3 cp s3://BUCKET/FOLDER/{{}} -' (with {{}} for the file's name)"
            )
        if scheme == "pipe" and "{}" not in where:
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
        text = self.persist(MANIFEST, self.read_manifest)
        manifest = Manifest.parse(text, self.address(MANIFEST))
        manifest.check_finished(str(self))
        for shard in manifest.shards:  # names go into commands and paths
            if not (re.fullmatch(r"\w[\w.-]*", shard.name) and re.fullmatch(r"[0-9a-f]{64}", shard.sha256)):
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
                    self.persist(shard.name, lambda: self.download(shard, path))
        return path

    def download(self, shard: Shard, path: Path) -> None:
        for left in path.parent.glob(f".{path.stem}.*.tmp.tar"):  # by a process that was killed
            left.unlink()
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            size, digest = receive(self.address(shard.name), file)
            if size != shard.bytes:
                raise FetchError(f"{size} bytes came, the manifest says {shard.bytes}")
            if digest != shard.sha256:
                raise FetchError("what came has another SHA-256 than the manifest says")

    def persist(self, name: str, attempt: Callable[[], T]) -> T:
        """The outcome of an attempt, or of one of the `retries` after it."""
        wait = FIRST_WAIT_S
        for _ in range(self.retries):
            try:
                return attempt()
            except FetchError as error:
                log.warning("%s cannot be read (%s): again in about %.0f s", self.address(name), error, wait)
                sleep(wait * random.Random().uniform(0.75, 1.25))  # not all processes of a cluster at once
                wait = min(2 * wait, LONGEST_WAIT_S)
        try:
            return attempt()
        except FetchError as error:
            raise InputError(
                f"{self.address(name)} cannot be read ({error}), in {self.retries + 1} attempt(s): check the address "
                f"and the network, and start again (data.retries says how often to try)"
            ) from error


class FetchError(Exception):
    """One attempt to read a file from elsewhere has failed."""


def open_shards(where: str, cache_dir: Path, retries: int) -> ShardSource:
    """The place that `where` names: a folder, or see above."""
    if where.startswith("pipe:") or "://" in where:
        return RemoteShards(where, cache_dir, retries)
    return LocalShards(Path(where))


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether the cache has a shard; what is under its name was checked before it got it."""
    return path.is_file() and path.stat().st_size == shard.bytes


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock on `path`, once others have released it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while (lock := FileLock.take(path)) is None:
            sleep(POLL_S)
    except OSError as error:
        raise InputError(f"cannot lock {path} ({error.strerror}): name another data.cache_dir") from error
    try:
        yield
    finally:
        lock.release()


def receive(address: str, file: BinaryIO) -> tuple[int, str]:
    """Write what webdataset reads from an address to `file`.

    Returns:
        how many bytes, and their SHA-256.

    Raises:
        FetchError: if the program that reads fails, or sends nothing for `STALL_S` seconds.
        InputError: if there is no such program.
    """
    try:
        pipe = gopen(address, "rb")  # a webdataset.gopen.Pipe, whatever the scheme
    except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
        raise InputError(f"{address} cannot be opened ({error}): is the program that reads it installed?") from error
    except OSError as error:
        raise FetchError(str(error)) from error
    digest, size = hashlib.sha256(), 0
    readable = poll()
    readable.register(pipe.stream, POLLIN)
    try:
        while readable.poll(1000 * STALL_S):
            data = pipe.stream.read1(CHUNK)
            if not data:
                check_status(pipe.proc.wait(STALL_S), address)
                return size, digest.hexdigest()
            file.write(data)
            digest.update(data)
            size += len(data)
        raise FetchError(f"nothing came for {STALL_S:.0f} s")
    except TimeoutExpired as error:
        raise FetchError(f"the program does not end within {STALL_S:.0f} s") from error
    finally:
        pipe.proc.kill()
        pipe.proc.wait()
        pipe.stream.close()


def check_status(status: int, address: str) -> None:
    """Raise FetchError for the exit code of a program that has failed."""
    if status:
        program = "the command" if address.startswith("pipe:") else "its program"
        known = None if address.startswith("pipe:") else REASONS.get(status)
        raise FetchError(known or f"{program} ended with {status}")
