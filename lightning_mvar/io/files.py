"""Files that are on disk whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_mvar.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the final name when the block ends without an exception.

    A process killed inside the block leaves a `.NAME.PID.tmp` and never a torn file under the final name. The
    temporary name keeps the suffix, for writers that choose a format by it.

    Raises:
        InputError: if the file cannot be written there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left of a file that only this one writes now."""
    for left in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):
        left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def path_component(name: str) -> str:
    """Turns any text into the name of one file or folder: no separator, not hidden, not `~` or an option's dash."""
    text = re.sub(r"[/\\\x00-\x1f\x7f]", "_", name).strip()[:100]
    return text if text and text[0] not in ".~-" else f"_{text}"
