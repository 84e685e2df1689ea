"""File locks, released when the processes that hold them exit, even if killed."""

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

LOCK_TIMEOUT_S, POLL_S = 8.0, 0.1  # loader workers of a killed process hold its lock for about 5 s more


class FileLock:
    """An flock; if passed to a child process, it is held until both processes have exited or released it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def try_acquire(cls, path: Path) -> FileLock | None:
        """Returns the lock on `path`, or None if it is already held."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def release(self) -> None:
        """Closes this process's handle; the lock stays held while a child holds it."""
        os.close(self.descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_lock, (DupFd(self.descriptor),)


def rebuild_lock(duplicate: Any) -> FileLock:
    """Unpickles a lock in a child process."""
    return FileLock(duplicate.detach())


@contextmanager
def lock_folder(folder: Path, command: str) -> Iterator[FileLock]:
    """Creates a folder and keeps other runs of a command out of it.

    Raises:
        InputError: if another run of the command uses the folder, or it is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock.try_acquire(folder / f".{command}.lock")
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while lock is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
            lock = FileLock.try_acquire(folder / f".{command}.lock")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --out") from error
    if lock is None:
        raise InputError(f"another {command} is running in {folder}: wait for it, or choose another --out")
    try:
        yield lock
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Returns whether any process holds the lock on `path`."""
    if not path.exists():
        return False
    lock = FileLock.try_acquire(path)
    if lock is not None:
        lock.release()
    return lock is None
