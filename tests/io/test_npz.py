"""Row-by-row reading and writing of npz arrays larger than memory; forged files cost neither memory nor time."""

from __future__ import annotations

import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.io.npz import NpzArray, read_npy, read_text, write_npz


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_equal_numpys_in_any_order_and_after_pickling(tmp_path: Path, pixels: np.ndarray, save) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path / "a.npz", first=np.arange(3), arr_0=pixels)
    rows = NpzArray(tmp_path / "a.npz", "arr_0")
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
    rows = NpzArray(tmp_path / "a.npz", "arr_0")
    assert sum(int(rows[i][0, 0, 0]) for i in range(400)) == sum(i % 7 for i in range(400))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < np.prod(shape) / 10


def test_damaged_files_and_missing_arrays_are_reported(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=pixels)
    with pytest.raises(InputError, match=r"a\.npz has no array arr_1; it holds arr_0"):
        NpzArray(path, "arr_1")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.npz is damaged or not an npz of arrays \(BadZipFile\)"):
        NpzArray(path, "arr_0")
    np.savez(path, arr_0=np.array([{}]))
    with pytest.raises(InputError, match="must hold numbers or strings, not object_"):
        NpzArray(path, "arr_0")
    np.savez_compressed(path, arr_0=pixels)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))
    rows = NpzArray(path, "arr_0")
    with pytest.raises(InputError, match=r"a\.npz is damaged"):
        _ = [rows[i] for i in range(40)]


def write_forged_npz(path: Path, header: str, content: bytes = b"", compression: int = zipfile.ZIP_DEFLATED) -> None:
    """Writes an npz whose array `arr_0` has any text as its header."""
    text = header.encode()
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + content)


def claim_size(path: Path, size: int) -> None:
    """Changes the size of the only member in the central directory of an archive."""
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    path.write_bytes(data)


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Fails if Python allocates more than `num_bytes` at once inside the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (HEADER.format("'|u1'", "(1000000000000, 32, 32, 3)"), r"claims the shape \(1000000000000, 32, 32, 3\) in a"),
        (HEADER.format("'|u1'", "(-1, 4)"), "claims the shape"),
        (HEADER.format("'|u1'", "(5,)"), "claims the shape"),
        (HEADER.format("'<U1000000'", "()"), "claims the shape"),
        (HEADER.format("'|O'", "(4,)"), "must hold numbers or strings, not object_"),
        (HEADER.format("'|V4'", "()"), "must hold numbers or strings, not void"),
        (HEADER.format("'<M8[s]'", "()"), "must hold numbers or strings, not datetime64"),
        (HEADER.format("[('a', '|u1'), ('b', '|u1')]", "(2,)"), "must hold numbers or strings, not void"),
        (HEADER.format("7", "(4,)"), "header of the array is damaged"),
        (HEADER.format("'|u1'", "4"), "header of the array is damaged"),
        (HEADER.format("'|u1'", "(4.0,)"), "header of the array is damaged"),
        (HEADER.format("'|u1'", "(4,"), "header of the array is damaged"),
        (HEADER.format("'|u1'", f"({'9' * 9000},)"), "header of the array is damaged"),
        (HEADER.format("'|u1'", "__import__('os').getpid()"), "header of the array is damaged"),
        ("[]", "header of the array is damaged"),
        ("(" * 9000, "header of the array is damaged"),
        ("-" * 9000 + "1", "header of the array is damaged"),
        (" " * 20_000, "header of the array is damaged"),
        ("", "header of the array is damaged"),
    ],
)
def test_a_forged_header_is_an_error_in_one_line(tmp_path: Path, header: str, message: str) -> None:
    write_forged_npz(tmp_path / "a.npz", header, b"1234")
    with at_most(10_000_000), pytest.raises(InputError, match=rf"a\.npz is damaged .*{message}") as error:
        NpzArray(tmp_path / "a.npz", "arr_0")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_an_array_in_fortran_order_and_foreign_bytes_is_read(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(12, dtype=">f4").reshape(3, 4))
    np.savez(tmp_path / "a.npz", arr_0=array)
    read = NpzArray(tmp_path / "a.npz", "arr_0").read()
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.float32
    assert read.flags.c_contiguous


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_that_claims_more_than_it_can_hold_is_an_error(tmp_path: Path, compression: int) -> None:
    path, size = tmp_path / "a.npz", 2**32 - 2
    text = HEADER.format("'|u1'", f"({size - 12 - 64},)").ljust(64)
    write_forged_npz(path, text, bytes(100), compression)
    claim_size(path, size)
    with at_most(10_000_000), pytest.raises(InputError, match=r"a\.npz is damaged .*cannot hold 4294967294 bytes"):
        NpzArray(path, "arr_0")


def test_compressed_content_is_not_inflated_before_its_shape_is_known(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", arr_1=np.zeros(2**22, np.int64))
    with at_most(2_000_000):
        array = NpzArray(tmp_path / "a.npz", "arr_1")
        assert array.shape == (2**22,)
        with pytest.raises(InputError, match="must be a short string"):
            read_text(tmp_path / "a.npz", "arr_1")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path: Path, method: int) -> None:
    write_forged_npz(tmp_path / "a.npz", HEADER.format("'|u1'", "(4,)"), b"1234", method)
    with pytest.raises(InputError, match="must be stored or deflated"):
        NpzArray(tmp_path / "a.npz", "arr_0")


@pytest.mark.parametrize(
    "forge",
    [
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
        lambda path: np.save(path.open("wb"), np.arange(3)),
        lambda path: pickle.dump([1], path.open("wb")),
    ],
)
def test_anything_else_is_an_error_at_once(tmp_path: Path, forge: Callable[[Path], object]) -> None:
    forge(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"a\.npz (is|has)"):
        NpzArray(tmp_path / "a.npz", "arr_0")


def test_a_bare_array_is_read_without_pickle_and_never_larger_than_its_file() -> None:
    for forged in (b"", b"\x93NUMPY", pickle.dumps([1]), bytes(300), b"\x93NUMPY\x09\x09" + bytes(300)):
        with pytest.raises(ValueError, match="header of the array is damaged"):
            read_npy(forged)


def test_bits_flipped_anywhere_are_an_error_or_other_numbers(tmp_path: Path, pixels: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "a.npz", arr_0=pixels[:2, :8])
    content = (tmp_path / "a.npz").read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (tmp_path / "b.npz").write_bytes(damaged)
        with suppress(InputError):
            NpzArray(tmp_path / "b.npz", "arr_0").read()
