"""Decompresses tar archives once into the cache, because images are read in random order."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lightning_mvar.errors import InputError, require_package
from lightning_mvar.io.fetch import wait_for_lock
from lightning_mvar.io.files import atomic_path, open_regular, remove_unfinished

CHUNK_BYTES = 2**20
MAX_RATIO, MAX_SMALL_BYTES = 50, 2**28  # the limit is MAX_RATIO times the compressed size plus MAX_SMALL_BYTES


def open_zstandard(file: BinaryIO) -> Any:
    require_package("pyarrow", "parquet", "reading .tar.zst (unless you run unzstd in advance)")
    import pyarrow  # type: ignore[import-untyped]

    return pyarrow.CompressedInputStream(file, "zstd")


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zstandard,
    ".tzst": open_zstandard,
}
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tzst")
TAR_SUFFIXES = (".tar", *COMPRESSED_SUFFIXES)
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def decompressed(path: Path, cache_dir: Path) -> Path:
    """Returns the path of a tar archive, decompressed into the cache if it is compressed.

    Args:
        path: the archive; the result has its name without the compression's suffix.
        cache_dir: local folder; a file that is already there is reused unless the archive has changed.

    Raises:
        InputError: if the archive is damaged, or decompresses to much more than images would.
    """
    if not path.name.endswith(COMPRESSED_SUFFIXES):
        return path
    stem = path.name[: -len(next(suffix for suffix in COMPRESSED_SUFFIXES if path.name.endswith(suffix)))]
    with open_regular(path) as file:
        status = path.stat()
        identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        result = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:16] / f"{stem}.tar"
        if not result.is_file():
            with wait_for_lock(result.with_name(f".{result.name}.lock")):
                if not result.is_file():  # another process may have decompressed it in the meantime
                    remove_unfinished(result)
                    with atomic_path(result) as temporary, open(temporary, "wb") as target:
                        decompress(path, file, target, MAX_SMALL_BYTES + MAX_RATIO * status.st_size)
    return result


def decompress(path: Path, file: BinaryIO, target: BinaryIO, max_bytes: int) -> None:
    size = 0
    stream = OPENERS[path.suffix](file)
    while data := read_chunk(stream, path):
        size += len(data)
        if size > max_bytes:
            raise InputError(f"{path} holds more than {max_bytes} bytes, too many for images: decompress it yourself")
        target.write(data)


def read_chunk(stream: Any, path: Path) -> bytes:
    try:
        return bytes(stream.read(CHUNK_BYTES))
    except DAMAGED as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())}): download it again") from error
