"""Atomic file writes, reads of regular files only, and safe file names."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_mvar.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, which is renamed to `path` if the block ends without an exception.

    A process killed inside the block leaves a `.NAME.HOST.RANDOM.tmp` file, never a partial file under the final name.
    The temporary name keeps the suffix for writers that choose a format by it. It does not contain the process id,
    which containers that share a file system may have in common.

    Raises:
        InputError: if the file cannot be written.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"cannot write {str(path)!r}: name a file")
    temporary = path.with_name(f".{path.stem}.{host_name()}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file, or a symlink to one, for reading bytes.

    All files that may come from elsewhere are opened with it: a FIFO would block until somebody writes to it, and a
    device may never end.

    Raises:
        InputError: if the file is missing, unreadable or not a regular file.
    """
    try:
        file = open_if_regular(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error
    if file is None:
        raise InputError(f"{path} is not a regular file")
    return file


def open_if_regular(path: str | Path) -> BinaryIO | None:
    """Opens a file as `open_regular` does; returns None if it is not a regular file.

    Raises:
        OSError: if the file is missing or unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # the name holds NUL
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    return None


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Reads a regular file completely.

    Raises:
        InputError: if it is missing, unreadable, not a regular file or larger than `max_bytes`.
    """
    with open_regular(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror})") from error
    if len(data) > max_bytes:
        raise InputError(f"{path} has more than {max_bytes} bytes, too many for this kind of file")
    return data


def create_folder(folder: Path, remedy: str) -> None:
    """Creates a folder with its parents, unless it exists.

    Raises:
        InputError: if that fails, or the name is not UTF-8, which messages, JSON and YAML require; the message ends
            with `remedy`.
    """
    try:
        str(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError as error:
        raise InputError(f"the name {str(folder)!a} is not UTF-8: {remedy}") from error
    except FileExistsError as error:
        what = "file" if folder.exists() else "link to nothing"
        raise InputError(f"{folder} is a {what}; name a folder to write to") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): {remedy}") from error


def remove_unfinished(path: Path) -> None:
    """Removes temporary files left by writers of `path` that were killed on this host.

    Call it while no other process on this host writes `path`. Files of other hosts stay: their writers may be alive.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}.{host_name()}.*.tmp{glob.escape(path.suffix)}"):
        leftover.unlink(missing_ok=True)


def host_name() -> str:
    """Returns the name of this machine or container, as part of a file name."""
    return re.sub(r"[^\w-]", "_", socket.gethostname())[:40]


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def path_component(name: str) -> str:
    """Turns any text into one path component: no separators, and no leading `.`, `~` or `-`."""
    text = re.sub(r"[/\\\x00-\x1f\x7f]", "_", name)
    text = text.encode()[:200].decode(errors="ignore").strip()  # file systems allow 255 bytes
    return text if text and text[0] not in ".~-" else f"_{text}"
