"""Classifies file names: images, clutter left by systems and programs, data set splits."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from lightning_mvar.data.images.decoding import SUFFIXES
from lightning_mvar.devices import is_first_rank
from lightning_mvar.errors import InputError

# Left by macOS, Windows, Synology and file systems. Hidden names, such as .DS_Store or .ipynb_checkpoints, also count.
CLUTTER = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "#recycle", "lost+found"),
}
PAX_HEADERS = re.compile(r"PaxHeaders(\.\d+)?")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

log = logging.getLogger(__name__)


class Skipped:
    """Counts files that are left out of a set of images, by reason, with an example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def report(self, source: str) -> None:
        """Logs what was left out on one line, once per run however often the set is opened."""
        if self.counts and is_first_rank():
            parts = [f"{reason} ({n}, such as {self.examples[reason]!r})" for reason, n in self.counts.items()]
            log_once(logging.WARNING, f"{source}: left out {'; '.join(parts)}")


@cache
def log_once(level: int, line: str) -> None:
    log.log(level, "%s", line)


def is_image(name: str) -> bool:
    """Returns whether a file name (without folders) belongs to an image; hidden files do not count."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def is_clutter(name: str) -> bool:
    """Returns whether a file or folder with this name (without its parents) is not part of a set of images."""
    return name.startswith(".") or name.lower() in CLUTTER or PAX_HEADERS.fullmatch(name) is not None


def visible(paths: Iterable[Path]) -> Iterator[Path]:
    """Skips paths whose names start with a dot, such as unfinished files, and clutter left by the system."""
    return (path for path in paths if not is_clutter(path.name))


def without_suffix(name: str) -> str:
    """Removes an image's suffix from a file name, if it has one."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def refuse_splits(classes: Sequence[str], source: str, remedy: str) -> None:
    """Raises InputError if all classes are named like splits; the message ends with `remedy`."""
    if all(name.lower() in SPLITS for name in classes):
        look = "looks like a split rather than a class" if len(classes) == 1 else "look like splits rather than classes"
        raise InputError(f"{source} has {', '.join(classes)}, which {look}: {remedy}")


def refuse_single_parent(classes: Sequence[str], names: Iterable[str], source: str) -> None:
    """Raises InputError if all images are in subfolders of a single folder, which may be the actual classes."""
    folders = {name.split("/")[1] if name.count("/") > 1 else "" for name in names}
    if len(classes) == 1 and len(folders) > 1 and "" not in folders:
        raise InputError(
            f"{source} has one folder, {classes[0]}, with {len(folders)} folders in it: if these are the classes, pass "
            f"--images {source}/{classes[0]}; if it is the only class, put its images directly into it"
        )


def refuse_split_files(paths: Sequence[Path], source: str) -> None:
    """Raises InputError if the names of a folder's files say that they belong to several splits."""
    splits = Counter(split for path in paths if (split := split_of(path.name)))
    if len(splits) > 1 and sum(splits.values()) == len(paths):
        counts = ", ".join(f"{split} ({count} files)" for split, count in splits.items())
        raise InputError(
            f"{source} has the splits {counts}: choose one, such as --images '{source}/*{next(iter(splits))}*', or "
            f"take all with '{source}/*'"
        )


def split_of(name: str) -> str | None:
    """Returns the split in a file name such as train-00000-of-00002.parquet; None if there is none."""
    return next((word for word in re.split(r"[-_.]", name.lower()) if word in SPLITS), None)
