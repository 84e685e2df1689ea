"""Images in tar archives, read where they lie: nothing is unpacked.

An archive is taken for what its members say it is: ImageNet's `ILSVRC2012_img_train.tar`, a tar of a tar for each
class; folders of classes in one tar; WebDataset shards, images beside a `.cls` each; tars of one class each, named
after it; or, with a file of labels, images alone, such as `ILSVRC2012_img_val.tar`.
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

    archive: int  # its number among the archives
    path: str  # in the archive that holds it
    offset: int  # bytes, in the outermost archive
    size: int
    inner: str = ""  # the archive in the archive that holds it

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def sample(self) -> tuple[int, str]:
        """What WebDataset takes for one sample: the files that are called alike up to the first dot."""
        folder, name = os.path.split(self.path)
        return self.archive, f"{folder}/{name.split('.')[0]}"


class Named(NamedTuple):
    """What images are called: class names in label order, and of each image its key and its label."""

    class_names: list[str]
    keys: list[str]
    labels: list[int]


class TarImages(EncodedImages):
    """Images of one archive or several.

    Args:
        paths: of the archives.
        labels: of the images by name; where given, the archives' own are not looked for.
        class_names: in label order, where the archives have numbers.

    Raises:
        InputError: if one is missing, damaged or compressed, or has images without a class.
    """

    def __init__(self, paths: Sequence[Path], labels: Labels | None, class_names: Sequence[str] | None) -> None:
        self.paths = list(paths)
        members = [*tqdm(list_members(self.paths), desc="list archives", unit="file", leave=False)]
        images = sorted((m for m in members if is_image(m.name)), key=lambda m: m.name)
        if not images:
            raise InputError(f"no images in {self.paths[0]}: expected members that end with .jpg, .jpeg, .png or .webp")
        numbers = {member.sample: member for member in members if member.path.endswith(".cls")}
        if labels is not None:
            named = Named(labels.class_names, *labels.keyed([m.name for m in images], self.paths[0]))
        elif numbers:
            named = by_number(images, self.numbers_of(images, numbers), class_names, self.paths)
        else:
            refuse_samples(images, members, self.paths)
            named = by_place(images, self.paths)
        super().__init__(*named, np.array([(m.archive, m.offset, m.size) for m in images], np.int64))

    def files(self) -> Iterable[Path]:
        return self.paths

    def where(self, index: int) -> str:
        return f"{self.paths[int(self.places[index, 0])]}: {self.key(index)}"

    def read(self, index: int) -> bytes:
        return self.bytes_at(*self.places[index].tolist())

    def bytes_at(self, archive: int, offset: int, size: int) -> bytes:
        with self.paths[archive].open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{self.paths[archive]} has become shorter")
        return data

    def numbers_of(self, images: list[Member], numbers: dict[tuple[int, str], Member]) -> list[int]:
        """What the `.cls` beside each image says."""
        found = []
        for image in tqdm(images, desc="read classes", unit="file", leave=False):
            member, where = numbers.get(image.sample), f"{self.paths[image.archive]}: {image.path}"
            if member is None:
                raise InputError(f"{where} has no class: there is no .cls beside it")
            text = self.bytes_at(member.archive, member.offset, member.size).decode(errors="replace").strip()
            if not text.isdecimal():
                raise InputError(f"{where} has the class {text!r}; a .cls must hold a number from 0")
            found.append(int(text))
        return found


def by_number(
    images: list[Member], labels: list[int], class_names: Sequence[str] | None, paths: Sequence[Path]
) -> Named:
    """Keys are CLASS/NAME, with the archive between where names come again in others."""
    names = list(class_names) if class_names is not None else [str(label) for label in range(max(labels) + 1)]
    if max(labels) >= len(names):
        raise InputError(f"{paths[0]} and the like have the class {max(labels)}; --class_names has {len(names)}")
    keys = [f"{names[label]}/{image.name}" for label, image in zip(labels, images, strict=True)]
    if len(set(keys)) < len(keys):
        stems = [paths[image.archive].stem for image in images]
        keys = [f"{names[label]}/{s}/{m.name}" for label, s, m in zip(labels, stems, images, strict=True)]
    return Named(names, keys, labels)


def refuse_samples(images: list[Member], members: list[Member], paths: Sequence[Path]) -> None:
    """Raise InputError for WebDataset shards that do not have classes as `.cls`."""
    others = {member.sample for member in members if not is_image(member.name)}
    found = next((m for m in images if not m.inner and "/" not in m.path and m.sample in others), None)
    if found is not None:
        raise InputError(f"{paths[found.archive]} has other files beside {found.path}, and no .cls with its class")


def by_place(images: list[Member], paths: Sequence[Path]) -> Named:
    """The class is the inner archive, the folder, or the archive that an image is in.

    Raises:
        InputError: if all images are in one place.
    """
    folders = [os.path.dirname(image.path) for image in images]
    above = os.path.commonpath(folders) if any(folders) else ""
    keys = []
    for image in images:
        inside = os.path.relpath(image.path, above) if above else image.path
        if image.inner:
            keys.append(f"{PurePosixPath(image.inner).stem}/{image.name}")
        elif "/" in inside:
            keys.append(inside)
        else:
            keys.append(f"{paths[image.archive].stem}/{image.name}")
    names = sorted({key.split("/")[0] for key in keys})
    if len(names) == 1 and len(paths) == 1 and not images[0].inner:
        raise InputError(f"{paths[0]} does not tell of which classes its images are: name a file of --labels")
    numbers = {name: label for label, name in enumerate(names)}
    return Named(names, keys, [numbers[key.split("/")[0]] for key in keys])


def list_members(paths: Sequence[Path]) -> Iterator[Member]:
    """All files of some archives.

    Raises:
        InputError: if one cannot be read.
    """
    for number, path in enumerate(paths):
        try:
            with path.open("rb") as file:
                yield from walk(file, 0, path.stat().st_size, number, "")
        except (OSError, EOFError, tarfile.TarError) as error:
            raise InputError(
                f"{path} is no tar archive, or compressed, or damaged ({error}): undo compression, or fetch it again"
            ) from error


def walk(file: BinaryIO, begin: int, end: int, number: int, inner: str) -> Iterator[Member]:
    """Files of the archive between two places of a file, and of the archives in it."""
    file.seek(begin)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            data = member.offset_data
            if data + member.size > end:
                raise tarfile.ReadError(f"it ends in the middle of {member.name}")
            if member.isfile() and member.name.endswith(".tar") and not inner:
                yield from walk(file, data, data + member.size, number, member.name)
            elif member.isfile():
                yield Member(number, member.name.removeprefix("./").lstrip("/"), data, member.size, inner)
            archive.members.clear()  # type: ignore[attr-defined]  # which tarfile would keep
        file.seek(archive.offset)
        if any(file.read(min(tarfile.BLOCKSIZE, end - archive.offset))):  # where tarfile takes damage for the end
            raise tarfile.ReadError(f"it is damaged at byte {archive.offset}")
