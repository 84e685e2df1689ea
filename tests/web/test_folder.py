"""Tests of the page's temporary folder: bounded, removed at the end, and after a kill at the next start."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.web import folder as module
from lightning_mvar.web.folder import PageFolder, create_locked, page_folder


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_oldest_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FOLDER_BYTES", 1000)
    folder = PageFolder(tmp_path)
    files = [folder.new_folder() / f"{number}.png" for number in range(20)]
    for age, file in enumerate(files):
        file.write_bytes(b"x" * 100)
        os.utime(file, (age, age))
    folder.make_room()
    assert [file for file in files if file.exists()] == files[10:]
    folder.make_room(num_bytes=750)
    assert [file for file in files if file.exists()] == files[18:]
    monkeypatch.setattr(module, "MAX_FILES", 1)
    folder.make_room()
    assert [file for file in files if file.exists()] == files[19:]
    assert list(folder.served.iterdir()) == [files[19].parent]


def test_a_folder_that_another_server_removes_is_passed_over(
    temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = temporary_folder / f"{module.PREFIX}a"
    monkeypatch.setattr(Path, "glob", lambda *_: iter([missing]))
    with page_folder() as folder:
        assert folder.path.is_dir()


def test_the_folder_is_removed_at_the_end(temporary_folder: Path) -> None:
    with suppress(RuntimeError), page_folder() as folder:
        tempfile.mkstemp()
        (folder.new_folder() / "image.png").write_bytes(b"x")
        assert [path.name for path in temporary_folder.iterdir()] == [folder.path.name]
        raise RuntimeError("stop")
    assert list(temporary_folder.iterdir()) == []
    assert tempfile.gettempdir() == str(temporary_folder)


def test_folders_of_killed_servers_are_removed_at_the_next_start(temporary_folder: Path) -> None:
    killed, lock = create_locked(str(temporary_folder))
    (killed / "upload").write_bytes(b"x" * 1000)
    lock.release()
    running, lock = create_locked(str(temporary_folder))
    others = [temporary_folder / "lightning_mvar_serve_notes", temporary_folder / "lightning_mvar_serve_link"]
    others[0].mkdir()
    others[1].symlink_to(others[0])
    with page_folder():
        assert not killed.exists()
        assert running.exists()
        assert all(path.exists() for path in others)
    lock.release()


def test_a_folder_that_is_taken_for_abandoned_while_it_is_created_is_replaced(
    temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, attempts = module.FileLock.try_acquire, []

    def busy_at_first(path: Path) -> module.FileLock | None:
        attempts.append(path)
        return acquire(path) if len(attempts) > 1 else None

    monkeypatch.setattr(module.FileLock, "try_acquire", busy_at_first)
    path, lock = create_locked(str(temporary_folder))
    assert path == attempts[1].parent
    lock.release()


def test_an_unusable_temporary_folder_is_reported(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary_folder / "missing"))
    with (
        pytest.raises(InputError, match=r"cannot write to .*missing \(No such file or directory\): set TMPDIR"),
        page_folder(),
    ):
        pass
