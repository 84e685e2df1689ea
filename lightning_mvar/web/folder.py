"""Temporary folder of a page, bounded in size; removed when the page ends, or at the next start if it was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_mvar.errors import InputError
from lightning_mvar.io.locks import LOCK, FileLock

PREFIX = "lightning_mvar_serve_"
MAX_FOLDER_BYTES, MAX_FILES = 256 * 2**20, 500


class PageFolder:
    """Folder of the files that gradio and the page write; beyond its bounds, the oldest files are removed.

    Uploads and drawn images are below `served`, which clients can read. The files in `shown`, those of the newest job,
    are never removed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.served = path, path / "served"
        self.served.mkdir()
        self.shown: frozenset[Path] = frozenset()

    def new_folder(self) -> Path:
        """Creates an empty folder for images."""
        return Path(tempfile.mkdtemp(dir=self.served))

    def make_room(self, num_bytes: int = 0) -> None:
        """Removes the oldest files until there is room for `num_bytes` more."""
        files = []
        for file in self.path.rglob("*"):
            with suppress(FileNotFoundError):  # gradio renames and removes its files at any time
                if file.is_file() and file != self.path / LOCK:
                    files.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        total, count = sum(size for _, size, _ in files) + num_bytes, len(files)
        for _, size, file in sorted(files):
            if total <= MAX_FOLDER_BYTES and count <= MAX_FILES:
                return
            if file in self.shown:
                continue
            file.unlink(missing_ok=True)
            total, count = total - size, count - 1
            with suppress(OSError):  # the folder holds other files
                file.parent.rmdir()


@contextmanager
def page_folder() -> Iterator[PageFolder]:
    """Creates the folder, uses it for all temporary files of this process, and removes it at the end.

    Raises:
        InputError: if the folder cannot be written.
    """
    parent = tempfile.gettempdir()
    remove_abandoned(Path(parent))
    try:
        path, lock = create_locked(parent)
    except OSError as error:
        raise InputError(f"cannot write to {parent} ({error.strerror}): set TMPDIR to another folder") from error
    tempfile.tempdir = str(path)
    try:
        yield PageFolder(path)
    finally:
        tempfile.tempdir = parent
        shutil.rmtree(path, ignore_errors=True)  # a job that has not ended yet may still write to it
        lock.release()


def create_locked(parent: str) -> tuple[Path, FileLock]:
    """Creates and locks a folder; tries again if another starting server has just locked it to remove it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = FileLock.try_acquire(path / LOCK)
        if lock is not None:
            return path, lock


def remove_abandoned(parent: Path) -> None:
    """Removes the folders of killed servers, recognized by a lock that nobody holds."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError):  # another starting server may remove it at the same time
            if path.lstat().st_uid != os.getuid() or path.is_symlink() or not (path / LOCK).is_file():
                continue
            lock = FileLock.try_acquire(path / LOCK)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                lock.release()
