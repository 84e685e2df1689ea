"""Only regular files are opened: others could block, or never end."""

import os
import socket
from pathlib import Path

import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.io.files import open_regular


def test_a_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"


def test_anything_else_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in [
        (tmp_path / "fifo", "is not a regular file"),
        (tmp_path / "link", "is not a regular file"),
        (tmp_path / "folder", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / ("x" * 300), "name too long"),
        (tmp_path / "a\0b", "null (byte|character)"),
    ]:
        with pytest.raises(InputError, match=message):
            open_regular(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(InputError, match="socket"):
            open_regular(tmp_path / "socket")
