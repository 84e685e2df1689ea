"""Downloads of remote files through webdataset's `gopen`, with retries; a file arrives complete or not at all.

    https://host/path                         also http://, gs://, hf:// and the other schemes of webdataset
    pipe:aws s3 cp s3://bucket/file.tar -     a command that prints the file

Processes on one machine share a cache: one of them downloads a file while the others wait for it.
"""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from select import POLLIN, poll
from subprocess import TimeoutExpired
from time import monotonic, sleep
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm
from webdataset.gopen import gopen, gopen_schemes

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, remove_unfinished
from lightning_mvar.io.locks import FileLock, poll_lock

FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0  # between attempts; the wait doubles each time
STALL_S = 120.0  # without a byte; longer than the retries that webdataset requests from curl
MIN_BYTES_PER_S = 10_000
RESERVE_BYTES = 2**28  # of the disk, which downloads leave free
CHUNK_BYTES = 2**18
CURL_ERRORS = {  # by exit code
    6: "the host is unknown",
    7: "the host cannot be reached",
    18: "the connection was lost",
    22: "the server answered with an error, such as 404",
    28: "the host did not answer in time",
    35: "no secure connection could be set up",
    52: "the server sent nothing",
    56: "the connection was lost",
    60: "the certificate is not trusted",
}

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRIES = 5  # further attempts after a failed download, by default


class FetchError(Exception):
    """A single attempt to read a remote file failed."""


def is_remote(address: str) -> bool:
    """Returns whether `address` is a URL or a command rather than a local path."""
    return address.startswith("pipe:") or "://" in address


def check_scheme(address: str) -> None:
    """Raises InputError if webdataset cannot read the scheme of `address`."""
    scheme = address.partition(":")[0]
    if scheme not in gopen_schemes:
        raise InputError(
            f"{address}: webdataset does not read {scheme}://; use a command that does, such as 'pipe:aws s3 cp "
            f"s3://BUCKET/FILE -' (for token shards, with {{}} in place of the file name)"
        )


def fetch_files(addresses: Sequence[str], cache_dir: Path, retries: int) -> list[Path]:
    """Downloads files into the cache, once for all processes of a machine, and returns their local paths.

    Contents are not checked, and a cached file is never refreshed.

    Args:
        addresses: URLs or commands for `gopen`; each contains a file name with a suffix.
        cache_dir: local folder; nothing is ever removed from it.
        retries: further attempts after a failure, with growing waits in between.

    Raises:
        InputError: if a file is unavailable.
    """
    return [fetch_file(address, cache_dir, retries) for address in tqdm(addresses, "fetch", unit="file", leave=False)]


def fetch_file(address: str, cache_dir: Path, retries: int) -> Path:
    check_scheme(address)
    name = remote_file_name(address)
    if not name:
        raise InputError(f"{address} has no file name: it must contain one with a suffix, such as train.tar")
    path = cache_dir / hashlib.sha256(address.encode()).hexdigest()[:16] / name

    def download() -> None:
        remove_unfinished(path)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            download_to(address, file, free_bytes(path))

    if not path.is_file():
        with wait_for_lock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # another process may have downloaded it in the meantime
                retry(address, download, retries)
    return path


def remote_file_name(address: str) -> str:
    """Returns the file name that ends a URL's path or a command's last word with a suffix; "" if neither has one."""
    words = address.split() if address.startswith("pipe:") else [urlsplit(address).path]
    names = [name for word in words if "." in (name := word.strip("'\"").rpartition("/")[2])]
    return names[-1] if names else ""


def retry(address: str, attempt: Callable[[], T], retries: int) -> T:
    """Calls `attempt`, and again up to `retries` times after a FetchError, and returns its result.

    Raises:
        InputError: if all attempts fail.
    """
    wait = FIRST_WAIT_S
    for _ in range(retries):
        try:
            return attempt()
        except FetchError as error:
            log.warning("%s cannot be read (%s): retrying in about %.0f s", address, error, wait)
            sleep(wait * random.Random().uniform(0.75, 1.25))  # jitter, so that a cluster does not retry in lockstep
            wait = min(2 * wait, MAX_WAIT_S)
    try:
        return attempt()
    except FetchError as error:
        raise InputError(
            f"{address} cannot be read ({error}), in {retries + 1} attempt(s): check the address and the network, and "
            f"run the command again (data.retries or --retries sets the number of retries)"
        ) from error


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Waits until the lock on `path` is free and holds it inside the block."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = poll_lock(partial(FileLock.try_acquire, path))
        assert lock is not None
    except OSError as error:
        raise InputError(
            f"cannot lock {path} ({error.strerror}): set data.cache_dir or --cache_dir to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def free_bytes(path: Path) -> int:
    """Returns how much may be written beside `path`: what the disk has free, except for a reserve."""
    return max(0, shutil.disk_usage(path.parent).free - RESERVE_BYTES)


def require_space(path: Path, size: int) -> None:
    """Raises InputError if a file of `size` bytes does not fit on the disk."""
    if size > (free := free_bytes(path)):
        raise InputError(
            f"{path} needs {size} bytes, and {free} are free (beside a reserve of {RESERVE_BYTES}): make space, or set "
            f"data.cache_dir or --cache_dir to another disk"
        )


def download_to(address: str, file: BinaryIO, max_bytes: int) -> tuple[int, str]:
    """Writes the content of `address` to an open file.

    Returns:
        number of bytes, and their SHA-256 as hex digits.

    Raises:
        FetchError: if the reading program fails, or sends nothing for `STALL_S` seconds, or over such a time less than
            `MIN_BYTES_PER_S` on average.
        InputError: if the reading program is not installed, or sends more than `max_bytes`.
    """
    try:
        pipe = gopen(address, "rb")  # a webdataset.gopen.Pipe for every scheme
    except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
        raise InputError(f"{address} cannot be opened ({error}): is the program that reads it installed?") from error
    except OSError as error:
        raise FetchError(str(error)) from error
    digest, size = hashlib.sha256(), 0
    window_begin, window_size = monotonic(), 0
    readable = poll()
    readable.register(pipe.stream, POLLIN)
    try:
        while readable.poll(1000 * STALL_S):
            data = pipe.stream.read1(CHUNK_BYTES)
            if not data:
                check_exit_code(pipe.proc.wait(STALL_S), address)
                return size, digest.hexdigest()
            size += len(data)
            if size > max_bytes:
                raise InputError(
                    f"{address} sends more than the {max_bytes} bytes that are expected, or fit on the disk"
                )
            file.write(data)
            digest.update(data)
            if (elapsed := monotonic() - window_begin) >= STALL_S:
                if size - window_size < MIN_BYTES_PER_S * elapsed:
                    raise FetchError(f"only {size - window_size} bytes in {elapsed:.0f} s")
                window_begin, window_size = monotonic(), size
        raise FetchError(f"no data for {STALL_S:.0f} s")
    except TimeoutExpired as error:
        raise FetchError(f"the program did not exit within {STALL_S:.0f} s") from error
    finally:
        pipe.proc.kill()
        pipe.proc.wait()
        pipe.stream.close()


def check_exit_code(code: int, address: str) -> None:
    """Raises FetchError if the program that read `address` failed."""
    if code:
        program = "the command" if address.startswith("pipe:") else "its program"
        reason = None if address.startswith("pipe:") else CURL_ERRORS.get(code)
        raise FetchError(reason or f"{program} exited with code {code}")
