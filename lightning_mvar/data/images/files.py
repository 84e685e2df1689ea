"""Labelled image files by number, not yet decoded: those of a folder here, those in archives beside this file."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.data.images.labels import Labels
from lightning_mvar.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class EncodedImages(ABC):
    """Image files in the order of their keys: the same images have the same numbers wherever they are stored.

    What is kept of each is in arrays and not in Python objects, which processes that read could not share.

    Args:
        class_names: in label order.
        keys: of each image, CLASS/NAME.
        labels: of each, in [0, classes).
        places: (n, m) of each, m integers that say where it is.
    """

    # Of each image, a number that it shares with those it is best read together with; None where that is all the same.
    groups: NDArray[np.int64] | None = None

    def __init__(
        self, class_names: Sequence[str], keys: Sequence[str], labels: Sequence[int], places: NDArray[np.int64]
    ) -> None:
        order = sorted(range(len(keys)), key=lambda i: keys[i].split("/"))
        self.class_names = list(class_names)
        try:
            self.keys = np.array([keys[i].encode() for i in order], dtype=bytes)
        except UnicodeEncodeError as error:
            raise InputError(f"the name {error.object!r} is not in UTF-8: rename that image") from error
        self.labels, self.places = np.array(labels, dtype=np.int64)[order], places[order]
        repeated = np.flatnonzero(self.keys[1:] == self.keys[:-1])
        if len(repeated):
            first, second = (self.where(int(repeated[0]) + i) for i in (0, 1))
            raise InputError(f"{first} and {second} go by one name: rename one, or remove it")

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return bytes(self.keys[index]).decode()

    @property
    def identity(self) -> str:
        """Changes when the files do."""
        return identity_of(self.files())

    @property
    def listing(self) -> str:
        """A hash of the images' keys and labels, and of the classes' names: the same wherever they are stored."""
        names = "\n".join(self.class_names).encode()
        return hashlib.sha256(b"\0".join([names, *self.keys.tolist(), self.labels.tobytes()])).hexdigest()

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """What holds the images."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What to call an image in a message: its path, or that of its archive with its name there."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image file.

        Raises:
            OSError: if it cannot be read.
        """


class FolderImages(EncodedImages):
    """`root/CLASS/NAME.{png,jpg,jpeg,webp}`, with folders in between as one likes; with a file of labels, `root/NAME`.

    Classes are the folders in sorted order, those without an image too.

    Args:
        root: the folder.
        labels: of the images by name, instead of folders of classes.

    Raises:
        InputError: if there are no images, or the labels do not fit them.
    """

    def __init__(self, root: Path, labels: Labels | None) -> None:
        self.root, self.labelled = root, labels is not None
        classes = sorted(path.name for path in visible(root.iterdir()) if path.is_dir())
        names = sorted(
            [name for folder in classes for name in images_below(root, folder)]
            if labels is None
            else [path.name for path in visible(root.iterdir()) if is_image(path.name)]
        )
        if not names:
            expected = f"{root}/CLASS/NAME" if labels is None else f"{root}/NAME"
            raise InputError(f"no images under {root}: expected {expected} with {', '.join(SUFFIXES)}")
        if labels is None:
            numbers = {name: label for label, name in enumerate(classes)}
            keys, own = names, [numbers[name.split("/")[0]] for name in names]
        else:
            classes = labels.class_names
            keys, own = labels.keyed(names, root)
        super().__init__(classes, keys, own, np.empty((len(keys), 0), np.int64))

    def path(self, index: int) -> Path:
        key = self.key(index)
        return self.root / (key.partition("/")[2] if self.labelled else key)

    def files(self) -> Iterable[Path]:
        return (self.path(index) for index in range(len(self)))

    def where(self, index: int) -> str:
        return str(self.path(index))

    def read(self, index: int) -> bytes:
        return self.path(index).read_bytes()


def images_below(root: Path, folder: str) -> Iterator[str]:
    """Paths of the images of a folder, and of the folders in it, as seen from `root`."""
    for found, _, names in os.walk(root / folder, followlinks=True):
        inside = Path(found).relative_to(root).as_posix()
        yield from (f"{inside}/{name}" for name in names if is_image(name))


def is_image(name: str) -> bool:
    """Whether a file of that name, without folders, is taken for an image; hidden ones are not."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def visible(paths: Iterable[Path]) -> Iterator[Path]:
    """Those whose names do not begin with a dot, as unfinished files' names do."""
    return (path for path in paths if not path.name.startswith("."))


def identity_of(files: Iterable[Path]) -> str:
    """A hash of names, sizes and times of change."""
    about = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()
