"""Downloads of remote files through fsspec, with retries; a file arrives complete or not at all.

    https://host/path                         also http://, s3://, gs:// and hf://
    pipe:rclone cat remote:bucket/file.tar    a command that prints the file

Each scheme's library finds its own credentials and options, in its files and environment variables; variables such as
FSSPEC_S3_ENDPOINT_URL work as documented by fsspec. Processes on one machine share a cache: one of them downloads a
file while the others wait for it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from select import POLLIN, poll
from subprocess import PIPE, Popen, TimeoutExpired
from threading import Thread
from time import monotonic, sleep
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fsspec import Callback, get_filesystem_class
from fsspec.core import url_to_fs
from tqdm import tqdm

from lightning_mvar.errors import InputError, install
from lightning_mvar.io.files import atomic_path, remove_unfinished
from lightning_mvar.io.fingerprint import sha256_of
from lightning_mvar.io.locks import FileLock, poll_lock

FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0  # between attempts; the wait doubles each time
STALL_S = 120.0  # time without data after which a download fails
MIN_BYTES_PER_S = 10_000
RESERVE_BYTES = 2**28  # disk space that downloads leave free
CHUNK_BYTES = 2**18
HTTP_OPTIONS = {"encoded": True}  # use the URL as given: quoting a signature again would break it
S3_OPTIONS = {"max_concurrency": 1}  # concurrent ranges would be reported only once all of them have arrived
SCHEMES = ("https", "http", "s3", "gs", "hf")  # their libraries report progress, which lets us limit the size
log = logging.getLogger(__name__)
T = TypeVar("T")

RETRIES = 5  # default number of further attempts after a failed download
RETRY_REMEDY = (
    "check the address and the network, and run the command again (data.retries or --retries sets the number of "
    "retries)"
)
FOLDER_REMEDY = "set data.cache_dir or --cache_dir to another folder (TORCH_HOME, for published weights)"


class FetchError(Exception):
    """An attempt to read a remote file failed."""


def is_remote(address: str) -> bool:
    """Returns whether `address` is a URL or a command rather than a local path."""
    return address.startswith("pipe:") or "://" in address


def check_scheme(address: str) -> None:
    """Raises InputError unless `address` is a command, or a URL of a supported scheme whose library is installed."""
    scheme = address.partition(":")[0]
    if scheme == "pipe":
        return
    if scheme not in SCHEMES:
        raise InputError(
            f"{address}: {scheme}:// is not supported; use a path, https://, s3://, gs:// or hf://, or a command such "
            f"as 'pipe:rclone cat REMOTE:FILE' (for token shards, with {{}} in place of the file name)"
        )
    try:
        parts = urlsplit(address)
        if not parts.netloc or "::" in address or (scheme in ("http", "https") and parts.port == 0):
            raise ValueError("it needs a host or bucket, and must not contain ::")
        get_filesystem_class(scheme)
    except ValueError as error:
        raise InputError(f"{address} is not a valid URL ({error})") from error
    except ImportError as error:
        extra = f": {install('s3')}" if scheme == "s3" else ""
        raise InputError(f"{address} needs a library that is not installed ({error}){extra}") from error


def fetch_files(addresses: Sequence[str], cache_dir: Path, retries: int) -> list[Path]:
    """Downloads files into the cache, once for all processes on a machine, and returns their local paths.

    Contents are not checked, and a cached file is never refreshed.

    Args:
        addresses: URLs or commands; each contains a file name with a suffix.
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
    fetch_once(address, path, retries)
    return path


def fetch_once(
    address: str,
    path: Path,
    retries: int,
    size: int | None = None,
    sha256: str | None = None,
    remedy: str = RETRY_REMEDY,
) -> None:
    """Downloads a file to `path` unless it exists; meanwhile, other processes on this machine wait.

    Args:
        address: URL or command.
        path: local file.
        retries: further attempts after a failure, with growing waits in between.
        size, sha256: size in bytes and hash of the file, if known; see `download_to`.
        remedy: end of the error message if all attempts fail.

    Raises:
        InputError: if the file is unavailable.
    """
    if path.is_file():
        return
    with wait_for_lock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():  # another process may have downloaded it in the meantime
            retry(address, lambda: download_to(address, path, size, sha256), retries, remedy)


def download_to(address: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Downloads a file; it appears under `path` complete and checked, or not at all.

    Args:
        address: URL or command.
        path: local file; no other process may be downloading it.
        size: exact number of bytes; by default, any number that fits on the disk.
        sha256: SHA-256 as hex digits; by default, the content is not checked.

    Raises:
        FetchError: if the file cannot be read, or its size or hash is wrong.
        InputError: if it does not fit on the disk.
    """
    remove_unfinished(path)
    if size is not None:
        require_space(path, size)
    with atomic_path(path) as temporary:
        download(address, temporary, free_bytes(path) if size is None else size)
        if size is not None and (received := temporary.stat().st_size) != size:
            raise FetchError(f"received {received} bytes instead of {size}")
        if sha256 is not None and (received_hash := sha256_of(temporary)) != sha256:
            raise FetchError(f"the SHA-256 of the received bytes is {received_hash}, not {sha256}")


def remote_file_name(address: str) -> str:
    """Returns the file name at the end of a URL's path, or of the last such word of a command; "" if there is none."""
    words = address.split() if address.startswith("pipe:") else [urlsplit(address).path]
    names = [name for word in words if "." in (name := word.strip("'\"").rpartition("/")[2])]
    return names[-1] if names else ""


def retry(address: str, attempt: Callable[[], T], retries: int, remedy: str = RETRY_REMEDY) -> T:
    """Calls `attempt` and returns its result; after a FetchError, tries again up to `retries` times.

    Raises:
        InputError: if all attempts fail.
    """
    wait_s = FIRST_WAIT_S
    for _ in range(retries):
        try:
            return attempt()
        except FetchError as error:
            log.warning("%s cannot be read (%s): retrying in about %.0f s", address, error, wait_s)
            sleep(wait_s * random.Random().uniform(0.75, 1.25))  # jitter, so that a cluster does not retry in lockstep
            wait_s = min(2 * wait_s, MAX_WAIT_S)
    try:
        return attempt()
    except FetchError as error:
        raise InputError(f"{address} cannot be read ({error}), in {retries + 1} attempt(s): {remedy}") from error


@contextmanager
def wait_for_lock(path: Path, remedy: str = FOLDER_REMEDY) -> Iterator[None]:
    """Waits until the lock on `path` is free and holds it inside the block.

    Raises:
        InputError: if the file cannot be created; the message ends with `remedy`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = poll_lock(partial(FileLock.try_acquire, path))
        assert lock is not None
    except OSError as error:
        raise InputError(f"cannot lock {path} ({error.strerror}): {remedy}") from error
    try:
        yield
    finally:
        lock.release()


def free_bytes(path: Path) -> int:
    """Returns how many bytes may be written next to `path`: the free disk space less a reserve."""
    return max(0, shutil.disk_usage(path.parent).free - RESERVE_BYTES)


def require_space(path: Path, size: int) -> None:
    """Raises InputError if a file of `size` bytes does not fit on the disk."""
    if size > (free := free_bytes(path)):
        raise InputError(
            f"{path} needs {size} bytes, but only {free} are free (with a reserve of {RESERVE_BYTES}): free disk "
            f"space, or {FOLDER_REMEDY}"
        )


class Progress(Callback):
    """Counts the bytes of a download, and aborts it if it is too large or too slow.

    Args:
        address: names the file in messages.
        max_bytes: maximum number of bytes.
    """

    def __init__(self, address: str, max_bytes: int) -> None:
        super().__init__()
        self.address, self.max_bytes, self.abandoned = address, max_bytes, False
        self.window_begin, self.window_size = monotonic(), 0

    def set_size(self, size: int) -> None:
        """Checks the size that a server announces before it sends data.

        Raises:
            InputError: if it exceeds `max_bytes`.
        """
        if size is not None and size > self.max_bytes:
            raise self.too_long()

    def too_long(self) -> InputError:
        return InputError(
            f"{self.address} sends more than the {self.max_bytes} bytes that are expected or fit on the disk"
        )

    def relative_update(self, inc: int = 1) -> None:
        """Counts `inc` bytes.

        Raises:
            InputError: if the total exceeds `max_bytes`.
            FetchError: if fewer than `MIN_BYTES_PER_S` arrive on average over `STALL_S`, or the download was abandoned.
        """
        self.value += inc
        if self.value > self.max_bytes:
            raise self.too_long()
        if self.abandoned:
            raise FetchError("abandoned")
        if (elapsed := monotonic() - self.window_begin) >= STALL_S:
            if self.value - self.window_size < MIN_BYTES_PER_S * elapsed:
                raise FetchError(f"only {self.value - self.window_size} bytes in {elapsed:.0f} s")
            self.window_begin, self.window_size = monotonic(), self.value


def download(address: str, path: Path, max_bytes: int) -> None:
    """Writes the content of `address` to a local file.

    Raises:
        FetchError: if it cannot be read, or stalls for `STALL_S` seconds, or is too slow, see `Progress`.
        InputError: if the library for its scheme is not installed, or it exceeds `max_bytes`.
    """
    progress = Progress(address, max_bytes)
    if address.startswith("pipe:"):
        download_from_command(address.removeprefix("pipe:"), path, progress)
    else:
        copy_url(address, path, progress)


def copy_url(address: str, path: Path, progress: Progress) -> None:
    """Downloads in a second thread, which is abandoned if it stalls: not every library has a timeout."""
    check_scheme(address)
    scheme = urlsplit(address).scheme
    options: dict[str, Any] = dict(S3_OPTIONS) if scheme == "s3" else {}
    if scheme in ("http", "https"):
        options = HTTP_OPTIONS | {"client_kwargs": http_client()}
    finished: Future[None] = Future()

    def copy() -> None:
        try:
            filesystem, name = resolve_url(address, options)
            filesystem.get_file(name, str(path), callback=progress)
            finished.set_result(None)
        except BaseException as error:  # raised below, in the waiting thread
            finished.set_exception(error)

    Thread(target=copy, daemon=True).start()
    received = 0
    while not wait([finished], STALL_S).done:
        if progress.value == received:
            progress.abandoned = True
            raise FetchError(f"no data for {STALL_S:.0f} s")
        received = progress.value
    if (error := finished.exception()) is not None:
        raise as_fetch_error(error)


def resolve_url(address: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Returns the filesystem of a URL and the name of its file; raises InputError if it is not a valid URL."""
    try:
        return url_to_fs(address, **options)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{address} is not a valid URL ({' '.join(str(error).split())[:200]})") from error


def http_client() -> dict[str, Any]:
    """Returns options for aiohttp: proxies from the environment, no limit on the total time, no decompression."""
    from aiohttp import ClientTimeout  # slow to import

    return {
        "trust_env": True,
        "timeout": ClientTimeout(None, sock_connect=STALL_S, sock_read=2 * STALL_S),
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,  # a server may declare an archive's own compression as a content encoding
    }


def as_fetch_error(error: BaseException) -> BaseException:
    """Turns an error of a library or of the network into a FetchError; others, such as a full disk, stay unchanged."""
    if isinstance(error, FileNotFoundError):
        return FetchError("there is no such file")
    from_library = type(error).__module__.partition(".")[0] not in ("builtins", __package__.partition(".")[0])
    if from_library or (isinstance(error, OSError) and error.errno != errno.ENOSPC):
        return FetchError(" ".join(str(error).split())[:200] or type(error).__name__)
    return error


def download_from_command(command: str, path: Path, progress: Progress) -> None:
    """Writes the output of a shell command to a file; see `download`."""
    process = Popen(command, stdout=PIPE, shell=True)
    assert process.stdout is not None
    readable = poll()
    readable.register(process.stdout, POLLIN)
    try:
        with open(path, "wb") as file:
            while readable.poll(1000 * STALL_S):
                data = process.stdout.read1(CHUNK_BYTES)  # type: ignore[attr-defined]
                if not data:
                    if code := process.wait(STALL_S):
                        raise FetchError(f"the command exited with code {code}")
                    return
                progress.relative_update(len(data))
                file.write(data)
        raise FetchError(f"no data for {STALL_S:.0f} s")
    except TimeoutExpired as error:
        raise FetchError(f"the command did not exit within {STALL_S:.0f} s") from error
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
