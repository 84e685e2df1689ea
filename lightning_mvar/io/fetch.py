"""Files from elsewhere, by anything that webdataset's `gopen` reads: retried, and whole or not at all.

    https://host/path                         also http://, gs://, hf:// and what else webdataset knows
    pipe:aws s3 cp s3://bucket/file.tar -     a command that prints the file

Processes that share a machine share what they fetch: one of them downloads, and the others wait for it.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from select import POLLIN, poll
from subprocess import TimeoutExpired
from time import sleep
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm
from webdataset.gopen import gopen, gopen_schemes

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, remove_unfinished
from lightning_mvar.io.locks import FileLock

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


class FetchError(Exception):
    """One attempt to read a file from elsewhere has failed."""


def is_remote(where: str) -> bool:
    """Whether it is not the path of a file or folder."""
    return where.startswith("pipe:") or "://" in where


def check_scheme(where: str) -> None:
    """Raise InputError for what webdataset does not read."""
    scheme = where.partition(":")[0]
    if scheme not in gopen_schemes:
        raise InputError(
            f"{where}: webdataset does not read {scheme}://; name a command that does, such as 'pipe:aws s3 cp "
            f"s3://BUCKET/FILE -' (for token shards with {{}} for the file's name)"
        )


def fetch_files(addresses: Sequence[str], cache_dir: Path, retries: int) -> list[Path]:
    """Files of the same names in a folder of the cache, downloaded once for all processes of a machine.

    They are taken for what they were when they came: only the reader of a file knows whether it is as it should be.

    Args:
        addresses: as `gopen` takes them, with a name in each that ends like a file's.
        cache_dir: folder on this machine; nothing is ever removed from it.
        retries: attempts after one that failed, with growing waits between.

    Raises:
        InputError: if one is not to be had.
    """
    return [fetch_file(address, cache_dir, retries) for address in tqdm(addresses, "fetch", unit="file", leave=False)]


def fetch_file(address: str, cache_dir: Path, retries: int) -> Path:
    check_scheme(address)
    name = name_in(address)
    if not name:
        raise InputError(f"{address} does not say what the file is called: it must have a name such as train.tar")
    path = cache_dir / hashlib.sha256(address.encode()).hexdigest()[:16] / name

    def download() -> None:
        remove_unfinished(path)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            receive(address, file)

    if not path.is_file():
        with alone(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # which another process may have fetched meanwhile
                persist(address, download, retries)
    return path


def name_in(address: str) -> str:
    """What the file is called: the end of a URL's path, or of a command's last word with a suffix; "" for none."""
    words = address.split() if address.startswith("pipe:") else [urlsplit(address).path]
    names = [name for word in words if "." in (name := word.strip("'\"").rpartition("/")[2])]
    return names[-1] if names else ""


def persist(address: str, attempt: Callable[[], T], retries: int) -> T:
    """The outcome of an attempt to read an address, or of one of the `retries` after it.

    Raises:
        InputError: if all fail.
    """
    wait = FIRST_WAIT_S
    for _ in range(retries):
        try:
            return attempt()
        except FetchError as error:
            log.warning("%s cannot be read (%s): again in about %.0f s", address, error, wait)
            sleep(wait * random.Random().uniform(0.75, 1.25))  # not all processes of a cluster at once
            wait = min(2 * wait, LONGEST_WAIT_S)
    try:
        return attempt()
    except FetchError as error:
        raise InputError(
            f"{address} cannot be read ({error}), in {retries + 1} attempt(s): check the address and the network, and "
            f"start again (data.retries, or --retries, says how often to try)"
        ) from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock on `path`, once others have released it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while (lock := FileLock.take(path)) is None:
            sleep(POLL_S)
    except OSError as error:
        raise InputError(
            f"cannot lock {path} ({error.strerror}): name another data.cache_dir, or --cache_dir"
        ) from error
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
