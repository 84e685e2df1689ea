"""Row-by-row reading and writing of npz arrays larger than memory."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.io.npz import NpzRows, read_npz, write_npz


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_equal_numpys_in_any_order_and_after_pickling(tmp_path: Path, pixels: np.ndarray, save) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path / "a.npz", first=np.arange(3), arr_0=pixels)
    rows = NpzRows(tmp_path / "a.npz", "arr_0")
    assert len(rows) == 40
    for index in (0, 1, 2, 39, 5):
        assert (rows[index] == pixels[index]).all()
    assert (pickle.loads(pickle.dumps(rows))[7] == pixels[7]).all()
    with pytest.raises(IndexError):
        rows[40]


def test_written_rows_read_back_and_the_file_depends_on_the_content_alone(tmp_path: Path, pixels: np.ndarray) -> None:
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, "arr_0", iter(pixels), pixels.shape, {"arr_1": np.arange(40)})
    with np.load(tmp_path / "a.npz") as arrays:
        assert list(arrays) == ["arr_0", "arr_1"]
        assert (arrays["arr_0"] == pixels).all()
        assert (arrays["arr_1"] == np.arange(40)).all()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_reading_and_writing_never_hold_the_complete_array(tmp_path: Path) -> None:
    shape = (400, 128, 128, 3)
    row = np.zeros(shape[1:], np.uint8)
    tracemalloc.start()
    write_npz(tmp_path / "a.npz", "arr_0", (row + i % 7 for i in range(400)), shape, {})
    rows = NpzRows(tmp_path / "a.npz", "arr_0")
    assert sum(int(rows[i][0, 0, 0]) for i in range(400)) == sum(i % 7 for i in range(400))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < np.prod(shape) / 10


def test_damaged_files_and_missing_arrays_are_reported(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=pixels)
    with pytest.raises(InputError, match=r"a\.npz has no array arr_1; it holds arr_0"):
        read_npz(path, ["arr_1"])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.npz is damaged or not an npz of arrays \(BadZipFile\)"):
        NpzRows(path, "arr_0")
    np.savez(path, arr_0=np.array([{}]))
    with pytest.raises(InputError, match="without Python objects"):
        NpzRows(path, "arr_0")
    np.savez_compressed(path, arr_0=pixels)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))
    rows = NpzRows(path, "arr_0")
    with pytest.raises(InputError, match=r"a\.npz is damaged"):
        _ = [rows[i] for i in range(40)]
