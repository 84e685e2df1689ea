"""Labeled image files by index, not decoded yet; `FolderImages` reads folders, other modules read archives."""

from __future__ import annotations

import errno
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.data.images.class_words import KeysAndLabels
from lightning_mvar.data.images.decoding import SUFFIXES, UnusableFileError, read_file
from lightning_mvar.data.images.labels import Labels
from lightning_mvar.data.images.names import SPLITS, Skipped, is_clutter, is_image, refuse_single_parent, refuse_splits
from lightning_mvar.errors import InputError

SourceSplit = Literal["train", "val"]
HELD_OUT = 10  # one in this many images is held out for validation
MAX_LISTED = 10  # maximum number of classes in a summary


class EncodedImages(ABC):
    """Image files sorted by key, so that an image has the same index however the set is stored.

    Keys, labels and locations are arrays rather than Python objects, so loader workers share their memory.

    Args:
        class_names: class names in label order.
        keys: CLASS/NAME of each image.
        labels: label of each image, in [0, classes).
        locations: (n, m) integers that locate each image in its storage.
        skipped: files that were left out of the set.
    """

    # Read-locality group of each image (e.g. Parquet row group); None if order does not matter.
    groups: NDArray[np.int64] | None = None
    is_flat = False  # whether paths do not contain the classes: there is one class, or a label file
    same_name_remedy = "rename or remove one of them"

    def __init__(
        self,
        class_names: Sequence[str],
        keys: Sequence[str],
        labels: Sequence[int],
        locations: NDArray[np.int64],
        skipped: Skipped | None = None,
    ) -> None:
        self.skipped = Skipped() if skipped is None else skipped
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
            raise InputError(f"{first} and {second} have the same name: {self.same_name_remedy}")

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, split: SourceSplit) -> None:
        """Keeps the images of one split."""
        kept = np.flatnonzero(self.held_out == (split == "val"))
        self.keys, self.labels, self.locations = self.keys[kept], self.labels[kept], self.locations[kept]
        self.groups = None if self.groups is None else self.groups[kept]

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """Whether each image (n,) belongs to the validation split.

        This depends only on its class and name, or on its name if the images are flat. So an image stays in its split
        when others are added, and files with the same names in several classes are divided independently.
        """
        names = [key.partition(b"/")[2] if self.is_flat else key for key in self.keys.tolist()]
        return np.array([int.from_bytes(hashlib.sha256(name).digest()[:8], "big") % HELD_OUT == 0 for name in names])

    def key(self, index: int) -> str:
        return bytes(self.keys[index]).decode()

    @property
    def identity(self) -> str:
        """Hash that changes when the files change."""
        return identity_of(self.files())

    @property
    def listing(self) -> str:
        """Hash of keys, labels and class names, independent of how the images are stored."""
        names = "\n".join(self.class_names).encode()
        return hashlib.sha256(b"\0".join([names, *self.keys.tolist(), self.labels.tobytes()])).hexdigest()

    def summary(self) -> str:
        """Summarizes classes and images: `9 classes, 1,906 images: animals (212), flags (268), ...`.

        Class names are escaped, because they may come from untrusted archives.
        """
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        names = [name if name.isprintable() else repr(name) for name in self.class_names[:MAX_LISTED]]
        listed = [f"{name:.40} ({count:,})" for name, count in zip(names, counts, strict=False)]
        classes = "1 class" if len(counts) == 1 else f"{len(counts):,} classes"
        images = "1 image" if len(self) == 1 else f"{len(self):,} images"
        return f"{classes}, {images}: {', '.join(listed)}{', ...' if len(counts) > MAX_LISTED else ''}"

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """Returns the files that hold the images."""

    @abstractmethod
    def display_path(self, index: int) -> str:
        """Returns an image's path for messages; in an archive, the archive's path and the name inside."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file.

        Raises:
            OSError: if the file cannot be read.
            UnusableFileError: if there is no content to decode.
        """


class FolderImages(EncodedImages):
    """Images at `root/CLASS/.../NAME.{png,jpg,...}`, or at `root/NAME` with a single class or a label file.

    See `list_folder` for the files that are left out.

    Args:
        root: the folder.
        labels: labels from a file; then, folders in `root` are left out.
        class_names: class names in label order, if there is no label file; see `classes_from_folders`.

    Raises:
        InputError: if there are no images, or their classes are ambiguous.
    """

    def __init__(self, root: Path, labels: Labels | None, class_names: Sequence[str] | None = None) -> None:
        self.root, skipped = root, Skipped()
        folders, names = list_folder(root, skipped, recursive=labels is None)
        if not names:
            raise InputError(
                f"no images under {root}: expected pictures, or a folder of pictures per class, whose names end in "
                f"{', '.join(SUFFIXES)}"
            )
        if labels is None:
            named = classes_from_folders(root, folders, names, class_names)
        else:
            named = labels.assign(names, root, skipped)
        self.is_flat = "/" not in names[0]
        super().__init__(*named, np.empty((len(names), 0), np.int64), skipped)

    def path(self, index: int) -> Path:
        key = self.key(index)
        if self.is_flat:
            key = key.removeprefix(f"{self.class_names[int(self.labels[index])]}/")
        return self.root / key

    def files(self) -> Iterable[Path]:
        return (self.path(index) for index in range(len(self)))

    def display_path(self, index: int) -> str:
        return str(self.path(index))

    def read(self, index: int) -> bytes:
        path = self.path(index)
        try:
            return read_file(path)
        except OSError as error:
            if is_broken_link(error) and path.is_symlink():
                raise UnusableFileError("it is a link to a file that does not exist") from error
            raise


def classes_from_folders(
    root: Path, folders: Sequence[str], names: Sequence[str], class_names: Sequence[str] | None
) -> KeysAndLabels:
    """Takes the class of each image from its folder in `root`; images without folders have a single class.

    Args:
        root: the folder; images without class folders get its name as class, see `folder_class`.
        folders: the folders in `root`, which are the classes in this order, even if they are empty.
        names: paths of the images relative to `root`.
        class_names: the classes in label order, if given; the folders must be among them.

    Raises:
        InputError: if there are images in `root` and in folders, or the folders may not be the classes.
    """
    flat = [name for name in names if "/" not in name]
    if len(flat) == len(names):
        return keys_of_one_class(root, folder_class(root), names, class_names)
    if flat:
        nested = next(name for name in names if "/" in name)
        raise InputError(
            f"{root} has images outside class folders, such as {flat[0]}, and inside, such as {nested}: move the "
            f"former into a folder of their class, or elsewhere"
        )
    if class_names is None:
        split = next((name for name in folders if name.lower().startswith("train")), folders[0])
        remedy = f"choose one, such as {root}/{split}; if they are classes, `tokenize` takes their --class_names"
        refuse_splits(folders, str(root), remedy)
        refuse_single_parent(folders, names, str(root))
    return keys_of_classes(root, folders, names, class_names)


def keys_of_one_class(
    root: Path, default: str, names: Sequence[str], class_names: Sequence[str] | None
) -> KeysAndLabels:
    """Gives all images of a folder or archive the same class: the one in `class_names`, or else the default.

    Raises:
        InputError: if there are several class names.
    """
    classes = list(class_names or [default])
    if len(classes) != 1:
        raise InputError(
            f"the images in {root} are not in class folders, so they have one class, but --class_names has "
            f"{len(classes)}: pass their classes with --labels"
        )
    return KeysAndLabels(classes, [f"{classes[0]}/{name}" for name in names], [0] * len(names))


def keys_of_classes(
    root: Path, folders: Sequence[str], keys: Sequence[str], class_names: Sequence[str] | None
) -> KeysAndLabels:
    """Labels keys CLASS/NAME by the position of the class in `class_names`, or else in `folders`.

    Raises:
        InputError: if a folder is not one of the class names.
    """
    labels = {name: label for label, name in enumerate(class_names or folders)}
    unknown = [name for name in folders if name not in labels]
    if unknown:
        raise InputError(f"{root}/{unknown[0]} is not one of the classes of --class_names: add it there, or remove it")
    return KeysAndLabels(list(labels), list(keys), [labels[key.split("/")[0]] for key in keys])


def folder_class(root: Path) -> str:
    """Returns the name of a folder, or of its nearest parent if the name is that of a split, such as `train`."""
    parents = Path(os.path.abspath(root)).parts[1:]
    return next((name for name in reversed(parents) if name.lower() not in SPLITS), "images")


def list_folder(
    root: Path, skipped: Skipped, recursive: bool = True, known: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Lists the folders in `root` and the images in and below it, both sorted.

    Left out are hidden files and other clutter, files of other types, and links to folders that are listed anyway.

    Args:
        root: the folder.
        skipped: counts the files that are left out.
        recursive: whether to list folders below `root` as well.
        known: files in `root` that are expected and not counted.

    Returns:
        Names of the folders, and paths of the images relative to `root`.

    Raises:
        InputError: if a folder cannot be listed.
    """
    guard, folders, images = LinkGuard(root), list[str](), list[str]()
    pending = [""]  # folders still to list, with a slash at the end
    while pending:
        folder = pending.pop()
        for entry in scan(root / folder):
            name = folder + entry.name
            if name in known:
                continue
            reason = reason_to_skip(entry) if recursive or not is_folder(entry) else "folders"
            if reason is None and is_folder(entry) and not guard.admits(entry):
                reason = "links to folders of the same set"
            if reason is not None:
                skipped.add(reason, name)
            elif not is_folder(entry):
                images.append(name)
            else:
                pending.append(f"{name}/")
                folders += [] if folder else [name]
    return sorted(folders), sorted(images)


def reason_to_skip(entry: os.DirEntry[str]) -> str | None:
    """Returns the reason why a file or folder is not part of a set of images; None if it is."""
    if is_clutter(entry.name):
        return "hidden or system files or folders"
    if is_folder(entry):
        return None
    if not is_image(entry.name):
        return "files of other types"
    # A broken link counts as a missing image.
    return None if entry.is_symlink() or entry.is_file() else "pipes or devices"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder or a link to one; a link to itself is not."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_broken_link(error: OSError) -> bool:
    """Returns whether an error means that a file does not exist or is a link to itself."""
    return error.errno in (errno.ENOENT, errno.ELOOP)


class LinkGuard:
    """Admits each folder once, but no link to a folder inside `root` or to one that contains it: it may be a loop."""

    def __init__(self, root: Path) -> None:
        self.real_root = os.path.realpath(root)
        status = os.stat(root)
        self.admitted = {(status.st_dev, status.st_ino)}

    def admits(self, folder: os.DirEntry[str]) -> bool:
        if folder.is_symlink():
            real = os.path.realpath(folder.path)
            if os.path.commonpath([real, self.real_root]) in (real, self.real_root):
                return False
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        is_new = identity not in self.admitted
        self.admitted.add(identity)
        return is_new


def scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot list {folder} ({error.strerror}): make it readable, or remove it") from error


def identity_of(files: Iterable[Path]) -> str:
    """Hashes names, sizes and modification times of files; for a broken link, those of the link itself."""
    stats = [(str(path), status.st_size, status.st_mtime_ns) for path in files for status in [status_of(path)]]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def status_of(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        if not is_broken_link(error):
            raise
        return path.lstat()
