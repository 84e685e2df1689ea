"""Locks on files, which end with the processes that hold them, however those end."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from lightning_mvar.errors import InputError

PATIENCE_S, POLL_S = 8.0, 0.1  # processes that read for one that was killed notice after five seconds


class FileLock:
    """An flock; handed to a child process as an argument, it is held until both have ended or released it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> FileLock | None:
        """The lock on `path`, or None while somebody else holds it."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def release(self) -> None:
        """Close, which does not unlock what a child still holds."""
        os.close(self.descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return received, (DupFd(self.descriptor),)


def received(duplicate: Any) -> FileLock:
    """In the child."""
    return FileLock(duplicate.detach())


@contextmanager
def alone_in(folder: Path, command: str) -> Iterator[FileLock]:
    """Keep others of a command out of a folder, which is made.

    Raises:
        InputError: if another one is at work there, or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(folder / f".{command}.lock")
        end = time.monotonic() + PATIENCE_S
        while lock is None and time.monotonic() < end:
            time.sleep(POLL_S)
            lock = FileLock.take(folder / f".{command}.lock")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --out") from error
    if lock is None:
        raise InputError(f"another {command} is at work in {folder}: wait for it, or choose another --out")
    try:
        yield lock
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether anybody holds the lock on `path`."""
    if not path.exists():
        return False
    lock = FileLock.take(path)
    if lock is not None:
        lock.release()
    return lock is None
