"""Locks of folders that a command owns, and what is said if a folder cannot be owned."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.io.locks import FileLock, lock_folder


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mvar.io.locks.LOCK_TIMEOUT_S", 0.2)


def test_the_holder_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    message = r"another fit is running in .*run: wait for it, or choose another --out"
    with lock_folder(tmp_path / "run", "fit"), pytest.raises(InputError, match=message):
        lock_folder(tmp_path / "run", "export").__enter__()
    assert not list((tmp_path / "run").iterdir())
    with lock_folder(tmp_path / "run", "export"):
        pass


def hold(folder: Path, ready: str) -> None:
    with lock_folder(folder, "fit"):
        Path(ready).touch()
        time.sleep(60)


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "run", str(tmp_path / "ready")))
    process.start()
    while not (tmp_path / "ready").exists():
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(InputError, match="another fit is running"):
        lock_folder(tmp_path / "run", "fit").__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock_folder(tmp_path / "run", "fit"):
        pass


def test_a_lock_whose_file_was_removed_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner removes it at the end, perhaps between the two calls that acquire it here."""

    def flock_after_removal(descriptor: int, operation: int) -> None:
        (tmp_path / "lock").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock_after_removal)
        assert FileLock.try_acquire(tmp_path / "lock") is None
    assert FileLock.try_acquire(tmp_path / "lock") is not None


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(target)
    with pytest.raises(InputError, match=r"cannot write to .*run"):
        lock_folder(tmp_path / "run", "fit").__enter__()
    assert target.read_text() == "content"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_folder(tmp_path / "run", "fit"):
        assert "does not support locks: do not start a second command there" in caplog.text


def test_a_folder_that_cannot_be_owned_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    cases = {
        tmp_path / "file": "file is a file; name a folder to write to",
        tmp_path / "link": "link is a link to nothing; name a folder to write to",
        tmp_path / "file/below": r"cannot write to .*below \(Not a directory\): choose another --out",
        Path("/proc/run"): r"cannot write to /proc/run \(No such file or directory\): choose another --out",
        tmp_path / ("x" * 300): r"\(File name too long\): choose another --out",
        tmp_path / os.fsdecode(b"caf\xe9"): r"the name .*caf\\udce9' is not UTF-8: choose another --out",
    }
    for folder, message in cases.items():
        with pytest.raises(InputError, match=message):
            lock_folder(folder, "fit").__enter__()
