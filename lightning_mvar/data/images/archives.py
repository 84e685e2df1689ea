"""Images in tar archives, read in place without unpacking.

The members show the layout: ImageNet's `ILSVRC2012_img_train.tar`, a tar with one inner tar per class; one tar of class
folders; WebDataset shards, with a `.cls` next to each image; one tar per class, named after it; or, with a label file,
a flat tar of images such as `ILSVRC2012_img_val.tar`.
"""

from __future__ import annotations

import os.path
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from lightning_mvar.data.images.files import EncodedImages, is_image
from lightning_mvar.data.images.labels import Labels
from lightning_mvar.errors import InputError


class Member(NamedTuple):
    """A file in an archive."""

    archive: int  # index of the outermost archive
    path: str  # within the archive that contains it
    offset: int  # in bytes, within the outermost archive
    size: int
    inner: str = ""  # path of the inner archive that contains it, if any

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def sample_id(self) -> tuple[int, str]:
        """Identity of the WebDataset sample: files of one sample share their name up to the first dot."""
        folder, name = os.path.split(self.path)
        return self.archive, f"{folder}/{name.split('.')[0]}"


class KeysAndLabels(NamedTuple):
    """Class names in label order, and the key and label of each image."""

    class_names: list[str]
    keys: list[str]
    labels: list[int]


class TarImages(EncodedImages):
    """Images of one or more tar archives.

    Args:
        paths: the archives.
        labels: labels from a file, used instead of those of the archives.
        class_names: class names in label order, if the archives have class numbers.

    Raises:
        InputError: if an archive is missing, damaged or compressed, or an image has no class.
    """

    def __init__(self, paths: Sequence[Path], labels: Labels | None, class_names: Sequence[str] | None) -> None:
        self.paths = list(paths)
        members = [*tqdm(list_members(self.paths), desc="list archives", unit="file", leave=False)]
        images = sorted((m for m in members if is_image(m.name)), key=lambda m: m.name)
        if not images:
            raise InputError(f"no images in {self.paths[0]}: expected members ending in .jpg, .jpeg, .png or .webp")
        class_files = {member.sample_id: member for member in members if member.path.endswith(".cls")}
        if labels is not None:
            named = KeysAndLabels(labels.class_names, *labels.assign([m.name for m in images], self.paths[0]))
        elif class_files:
            named = keys_from_numbers(images, self.read_class_numbers(images, class_files), class_names, self.paths)
        else:
            reject_samples_without_class(images, members, self.paths)
            named = keys_from_paths(images, self.paths)
        super().__init__(*named, np.array([(m.archive, m.offset, m.size) for m in images], np.int64))

    def files(self) -> Iterable[Path]:
        return self.paths

    def display_path(self, index: int) -> str:
        return f"{self.paths[int(self.locations[index, 0])]}: {self.key(index)}"

    def read(self, index: int) -> bytes:
        return self.read_range(*self.locations[index].tolist())

    def read_range(self, archive: int, offset: int, size: int) -> bytes:
        with self.paths[archive].open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{self.paths[archive]} was truncated after it was opened")
        return data

    def read_class_numbers(self, images: list[Member], class_files: dict[tuple[int, str], Member]) -> list[int]:
        """Reads the class number of each image from the `.cls` file next to it."""
        numbers = []
        for image in tqdm(images, desc="read classes", unit="file", leave=False):
            member, name = class_files.get(image.sample_id), f"{self.paths[image.archive]}: {image.path}"
            if member is None:
                raise InputError(f"{name} has no class: add a .cls file next to it")
            text = self.read_range(member.archive, member.offset, member.size).decode(errors="replace").strip()
            if not text.isdecimal():
                raise InputError(f"{name} has the class {text!r}; a .cls file must contain a number from 0")
            numbers.append(int(text))
        return numbers


def keys_from_numbers(
    images: list[Member], labels: list[int], class_names: Sequence[str] | None, paths: Sequence[Path]
) -> KeysAndLabels:
    """Keys are CLASS/NAME, or CLASS/ARCHIVE/NAME if names repeat across archives."""
    names = list(class_names) if class_names is not None else [str(label) for label in range(max(labels) + 1)]
    if max(labels) >= len(names):
        raise InputError(
            f"the archives ({paths[0]}, ...) have the class {max(labels)}; --class_names has {len(names)} names"
        )
    keys = [f"{names[label]}/{image.name}" for label, image in zip(labels, images, strict=True)]
    if len(set(keys)) < len(keys):
        stems = [paths[image.archive].stem for image in images]
        rows = zip(labels, stems, images, strict=True)
        keys = [f"{names[label]}/{stem}/{image.name}" for label, stem, image in rows]
    return KeysAndLabels(names, keys, labels)


def reject_samples_without_class(images: list[Member], members: list[Member], paths: Sequence[Path]) -> None:
    """Raises InputError for WebDataset shards without `.cls` files."""
    others = {member.sample_id for member in members if not is_image(member.name)}
    image = next((m for m in images if not m.inner and "/" not in m.path and m.sample_id in others), None)
    if image is not None:
        raise InputError(
            f"{paths[image.archive]} has other files next to {image.path}, but no .cls file with its class"
        )


def keys_from_paths(images: list[Member], paths: Sequence[Path]) -> KeysAndLabels:
    """Takes the class of an image from its inner archive, its folder or its archive.

    Raises:
        InputError: if all images are in the same place.
    """
    folders = [os.path.dirname(image.path) for image in images]
    root = os.path.commonpath(folders) if any(folders) else ""
    keys = []
    for image in images:
        relative = os.path.relpath(image.path, root) if root else image.path
        if image.inner:
            keys.append(f"{PurePosixPath(image.inner).stem}/{image.name}")
        elif "/" in relative:
            keys.append(relative)
        else:
            keys.append(f"{paths[image.archive].stem}/{image.name}")
    names = sorted({key.split("/")[0] for key in keys})
    if len(names) == 1 and len(paths) == 1 and not images[0].inner:
        raise InputError(f"{paths[0]} does not say which classes its images belong to: pass a label file with --labels")
    numbers = {name: label for label, name in enumerate(names)}
    return KeysAndLabels(names, keys, [numbers[key.split("/")[0]] for key in keys])


def list_members(paths: Sequence[Path]) -> Iterator[Member]:
    """Lists all files of the archives.

    Raises:
        InputError: if an archive cannot be read.
    """
    for number, path in enumerate(paths):
        try:
            with path.open("rb") as file:
                yield from walk_archive(file, 0, path.stat().st_size, number, "")
        except (OSError, EOFError, tarfile.TarError) as error:
            raise InputError(
                f"{path} is not a tar archive, or compressed, or damaged ({error}): decompress it or download it again"
            ) from error


def walk_archive(file: BinaryIO, begin: int, end: int, number: int, inner: str) -> Iterator[Member]:
    """Lists the files of the archive at bytes `begin` to `end` of a file, and of its inner archives."""
    file.seek(begin)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            data = member.offset_data
            if data + member.size > end:
                raise tarfile.ReadError(f"it is truncated in the middle of {member.name}")
            if member.isfile() and member.name.endswith(".tar") and not inner:
                yield from walk_archive(file, data, data + member.size, number, member.name)
            elif member.isfile():
                yield Member(number, member.name.removeprefix("./").lstrip("/"), data, member.size, inner)
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all in memory
        file.seek(archive.offset)
        if any(file.read(min(tarfile.BLOCKSIZE, end - archive.offset))):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"it is damaged at byte {archive.offset}")
