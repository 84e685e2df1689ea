"""File locks, released when the processes that hold them exit, even if killed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import create_folder, open_regular

log = logging.getLogger(__name__)

LOCK = ".lock"  # file in a folder that a command has locked; holds the name of that command
LOCK_TIMEOUT_S, POLL_S = 8.0, 0.1  # loader workers of a killed process hold its lock for about 5 more seconds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems mounted without locks


class FileLock:
    """An flock; if passed to a child process, it is held until both processes have exited or released it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def try_acquire(cls, path: Path) -> FileLock | None:
        """Returns the lock on `path`, or None if it is already held or the file was removed meanwhile.

        On a file system without locks, it warns and returns a lock without effect.
        """
        # O_NOFOLLOW: a link in a foreign folder could point to any file, which `lock_folder` would overwrite.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    return None
                raise
            log.warning("the file system of %s does not support locks: do not start a second command there", path)
        if os.fstat(descriptor).st_nlink == 0:  # a lock on a removed file has no effect
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
def lock_folder(folder: Path, command: str, option: str = "--out") -> Iterator[FileLock]:
    """Creates a folder and locks it against other commands until the block or the process ends.

    With several ranks, only rank 0 calls this.

    Args:
        folder: folder that the command owns.
        command: name of the command, for the error message of other commands.
        option: option that names the folder, for messages.

    Raises:
        InputError: if another command uses the folder, or it cannot be created or written to.
    """
    deadline, remedy = time.monotonic() + LOCK_TIMEOUT_S, f"choose another {option}"
    try:
        lock = poll_lock(lambda: try_lock(folder, remedy), lambda: time.monotonic() > deadline)
        if lock is None:
            holder = (folder / LOCK).read_text() or "command"
            raise InputError(f"another {holder} is running in {folder}: wait for it, or {remedy}")
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, command.encode(), 0)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): {remedy}") from error
    try:
        yield lock
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def try_lock(folder: Path, remedy: str) -> FileLock | None:
    """Tries to lock a folder, which is created if it is missing; its previous owner may remove it at any time."""
    create_folder(folder, remedy)
    try:
        return FileLock.try_acquire(folder / LOCK)
    except FileNotFoundError:
        return None


def poll_lock(attempt: Callable[[], FileLock | None], stop: Callable[[], bool] = lambda: False) -> FileLock | None:
    """Calls `attempt` until it returns a lock, which is returned, or until `stop` returns True; then returns None."""
    while (lock := attempt()) is None and not stop():
        time.sleep(POLL_S)
    return lock


def is_locked(path: Path) -> bool:
    """Returns whether any process holds the lock on `path`."""
    if not path.exists():
        return False
    with open_regular(path) as file:  # for reading, as a report may be that of a folder of others
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return False
