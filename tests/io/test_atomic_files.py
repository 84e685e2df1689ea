"""Atomic writes: temporary names and leftovers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lightning_mvar.io.files import atomic_path, remove_unfinished


def test_two_writers_with_one_host_name_and_process_id_have_two_names(tmp_path: Path) -> None:
    """Containers that share a file system can have both in common."""
    with atomic_path(tmp_path / "a.npz") as one, atomic_path(tmp_path / "a.npz") as two:
        assert one != two
        assert one.suffix == two.suffix == ".npz"
        one.write_text("one")
        two.write_text("two")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_only_leftovers_of_this_host_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer on another host may still be alive."""
    target, left = tmp_path / "a[1].tar", dict[str, Path]()
    for host in ("here", "here.cluster", "there"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with atomic_path(target) as temporary:
            temporary.touch()
        left[host] = temporary
    target.unlink()
    for path in left.values():
        path.touch()  # as if those processes had been killed
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    remove_unfinished(target)
    assert set(tmp_path.iterdir()) == {left["here.cluster"], left["there"]}
