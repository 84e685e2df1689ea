"""Labelled image files by index, not yet decoded; `FolderImages` reads folders, sibling modules read archives."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.data.images.decoding import SUFFIXES, UnusableFileError, read_file
from lightning_mvar.data.images.labels import Labels
from lightning_mvar.errors import InputError


class EncodedImages(ABC):
    """Image files sorted by key, so that an image has the same index however the set is stored.

    Keys, labels and locations are arrays rather than Python objects, so that loader workers share their memory.

    Args:
        class_names: class names in label order.
        keys: CLASS/NAME of each image.
        labels: label of each image, in [0, classes).
        locations: (n, m) integers that locate each image in its storage.
    """

    # Read-locality group of each image (e.g. Parquet row group); None if order does not matter.
    groups: NDArray[np.int64] | None = None

    def __init__(
        self, class_names: Sequence[str], keys: Sequence[str], labels: Sequence[int], locations: NDArray[np.int64]
    ) -> None:
        order = sorted(range(len(keys)), key=lambda i: keys[i].split("/"))
        self.class_names = list(class_names)
        try:
            self.keys = np.array([keys[i].encode() for i in order], dtype=bytes)
        except UnicodeEncodeError as error:
            raise InputError(f"the name {error.object!r} is not valid UTF-8: rename that image") from error
        self.labels, self.locations = np.array(labels, dtype=np.int64)[order], locations[order]
        repeated = np.flatnonzero(self.keys[1:] == self.keys[:-1])
        if len(repeated):
            first, second = (self.display_path(int(repeated[0]) + i) for i in (0, 1))
            raise InputError(f"{first} and {second} have the same name: rename or remove one of them")

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return bytes(self.keys[index]).decode()

    @property
    def identity(self) -> str:
        """Hash that changes when the files change."""
        return identity_of(self.files())

    @property
    def listing(self) -> str:
        """Hash of keys, labels and class names, equal for equal images however they are stored."""
        names = "\n".join(self.class_names).encode()
        return hashlib.sha256(b"\0".join([names, *self.keys.tolist(), self.labels.tobytes()])).hexdigest()

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """Returns the files that hold the images."""

    @abstractmethod
    def display_path(self, index: int) -> str:
        """Returns an image's path for messages, or the path of its archive with its name inside."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file.

        Raises:
            OSError: if the file cannot be read.
            UnusableFileError: if there is no content to decode.
        """


class FolderImages(EncodedImages):
    """Images at `root/CLASS/.../NAME.{png,jpg,...}`, or at `root/NAME` with a label file.

    Classes are the folders in sorted order, including empty ones.

    Args:
        root: the folder.
        labels: labels from a file, used instead of class folders.

    Raises:
        InputError: if there are no images, or the labels do not fit them.
    """

    def __init__(self, root: Path, labels: Labels | None) -> None:
        self.root, self.is_flat = root, labels is not None
        classes = sorted(path.name for path in visible(root.iterdir()) if path.is_dir())
        names = sorted(
            [name for folder in classes for name in images_below(root, folder)]
            if labels is None
            else [path.name for path in visible(root.iterdir()) if is_image(path.name)]
        )
        if not names:
            expected = f"{root}/CLASS/NAME" if labels is None else f"{root}/NAME"
            raise InputError(f"no images under {root}: expected {expected} with a suffix of {', '.join(SUFFIXES)}")
        if labels is None:
            numbers = {name: label for label, name in enumerate(classes)}
            keys, image_labels = names, [numbers[name.split("/")[0]] for name in names]
        else:
            classes = labels.class_names
            keys, image_labels = labels.assign(names, root)
        super().__init__(classes, keys, image_labels, np.empty((len(keys), 0), np.int64))

    def path(self, index: int) -> Path:
        key = self.key(index)
        return self.root / (key.partition("/")[2] if self.is_flat else key)

    def files(self) -> Iterable[Path]:
        return (self.path(index) for index in range(len(self)))

    def display_path(self, index: int) -> str:
        return str(self.path(index))

    def read(self, index: int) -> bytes:
        path = self.path(index)
        if path.is_symlink() and not path.exists():
            raise UnusableFileError("it is a link to a file that does not exist")
        return read_file(path)


def images_below(root: Path, folder: str) -> Iterator[str]:
    """Lists the images in a folder and its subfolders, as paths relative to `root`."""
    for directory, _, names in os.walk(root / folder, followlinks=True):
        relative = Path(directory).relative_to(root).as_posix()
        yield from (f"{relative}/{name}" for name in names if is_image(name))


def is_image(name: str) -> bool:
    """Returns whether a file name (without folders) is that of an image; hidden files are not images."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def visible(paths: Iterable[Path]) -> Iterator[Path]:
    """Skips paths whose names start with a dot, such as unfinished files."""
    return (path for path in paths if not path.name.startswith("."))


def identity_of(files: Iterable[Path]) -> str:
    """Returns a hash of names, sizes and modification times."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
