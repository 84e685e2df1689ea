"""Images in tar archives, read in place without unpacking.

The layout is recognized by the members: ImageNet's `ILSVRC2012_img_train.tar`, a tar with one inner tar per class; a
tar of class folders; WebDataset shards, with a `.cls` file or a `.json` file with a label next to each image; one tar
per class, named after it; or a flat tar of images that have one class or a label file, as `ILSVRC2012_img_val.tar`.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from lightning_mvar.data.images.class_words import LABEL_FIELDS, NUMBER, KeysAndLabels, Numbers, labels_from_words
from lightning_mvar.data.images.decoding import SUFFIXES, check_bytes
from lightning_mvar.data.images.files import EncodedImages, folder_class, keys_of_classes, keys_of_one_class
from lightning_mvar.data.images.labels import Labels
from lightning_mvar.data.images.names import Skipped, is_clutter, is_image, refuse_splits
from lightning_mvar.data.images.tars import Member, list_members
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import open_regular
from lightning_mvar.io.json_files import shown

MAX_LABEL_BYTES = 2**20  # of a .cls or .json file


class TarImages(EncodedImages):
    """Images of one or more tar archives.

    Args:
        paths: the archives.
        labels: labels from a file, used instead of those of the archives; or the columns of WebDataset shards to use,
            as LABEL or IMAGE,LABEL, if there are several: LABEL is `cls` or a field of the `.json`, IMAGE a suffix.
        class_names: class names in label order, for class numbers or as the set of allowed folders or archives.

    Raises:
        InputError: if an archive is missing, damaged or compressed, or an image has no class.
    """

    same_name_remedy = "unpack the archive, which keeps the last one, and pack it again (tar -r and tar -u leave both)"

    def __init__(self, paths: Sequence[Path], labels: Labels | str | None, class_names: Sequence[str] | None) -> None:
        self.paths, skipped = list(paths), Skipped()
        image_column, _, label_column = labels.rpartition(",") if isinstance(labels, str) else ("", "", "")
        members = [member for member in list_members(self.paths, skipped) if not self.skips(member, skipped)]
        images = sorted((m for m in members if is_image(m.name)), key=lambda m: m.name)
        if image_column:
            images = [m for m in images if m.column == image_column]
        if not images:
            raise InputError(f"no images in {self.paths[0]}: expected members with a suffix of {', '.join(SUFFIXES)}")
        if isinstance(labels, Labels):
            named, self.is_flat = labels.assign([m.name for m in images], self.paths[0], skipped), True
        elif label_files := self.find_label_files(images, members, label_column):
            refuse_two_images(images, self.paths)
            words = self.read_classes(images, label_files, label_column)
            named = keys_from_words(images, words, class_names, self.paths)
        else:
            reject_samples_without_class(images, members, self.paths)
            named = keys_from_paths(images, self.paths, class_names)
            self.is_flat = len(named.class_names) == 1
        self.count_others(images, members, skipped)
        super().__init__(*named, np.array([(m.archive, m.offset, m.size) for m in images], np.int64), skipped)

    def skips(self, member: Member, skipped: Skipped) -> bool:
        """Returns whether a member is not part of a set of images; if so, counts it."""
        clutter = any(is_clutter(part) for part in PurePosixPath(member.path).parts)
        if clutter:
            skipped.add("hidden or system files or folders", f"{self.paths[member.archive]}: {member.path}")
        return clutter

    def count_others(self, images: list[Member], members: list[Member], skipped: Skipped) -> None:
        """Counts members that belong to no image."""
        samples = {member.sample_id for member in images}
        for member in members:
            if not is_image(member.name) and member.sample_id not in samples:
                skipped.add("files of other types", f"{self.paths[member.archive]}: {member.path}")

    def files(self) -> Iterable[Path]:
        return self.paths

    def display_path(self, index: int) -> str:
        return f"{self.paths[int(self.locations[index, 0])]}: {self.key(index)}"

    def read(self, index: int) -> bytes:
        archive, offset, size = self.locations[index].tolist()
        check_bytes(size)
        return self.read_range(archive, offset, size)

    def read_range(self, archive: int, offset: int, size: int) -> bytes:
        with open_regular(self.paths[archive]) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{self.paths[archive]} was truncated after it was opened")
        return data

    def find_label_files(
        self, images: list[Member], members: list[Member], column: str
    ) -> dict[tuple[int, str], Member]:
        """Finds the file with the class of each sample: the one that `column` names, otherwise `.cls`, then `.json`.

        Without `column`, `.json` files count only if they have a class and the images are not in several folders.
        """
        kinds = [column if column == "cls" else "json"] if column else ["cls", "json"]
        samples = {image.sample_id for image in images}
        for kind in kinds:
            found = {m.sample_id: m for m in members if m.column.split(".")[-1] == kind and m.sample_id in samples}
            if found and (column or kind == "cls"):
                return found
            in_folders = len({os.path.dirname(image.path) for image in images}) > 1
            if found and not in_folders and self.read_class(next(iter(found.values())), column) is not None:
                return found
        if column:
            raise InputError(f"{self.paths[0]} has no {kinds[0]} files next to its images: leave out --labels {column}")
        return {}

    def read_classes(
        self, images: list[Member], label_files: dict[tuple[int, str], Member], column: str
    ) -> list[str | int]:
        """Reads the class of each image, a name or a number, from the file next to it."""
        words: list[str | int] = []
        for image in tqdm(images, desc="read classes", unit="file", leave=False):
            member = label_files.get(image.sample_id)
            word = None if member is None else self.read_class(member, column)
            if word is None:
                raise InputError(f"{self.paths[image.archive]}: {image.path} has no class: add a .cls file next to it")
            words.append(word)
        return words

    def read_class(self, member: Member, column: str) -> str | int | None:
        """Reads the class in a `.cls` or `.json` file; None if the JSON has none."""
        name = f"{self.paths[member.archive]}: {member.path}"
        if member.size > MAX_LABEL_BYTES:
            raise InputError(f"{name} has {member.size} bytes, too many for a class")
        data = self.read_range(member.archive, member.offset, member.size)
        if member.column.endswith("json"):
            return class_in_json(data, name, column)
        text = data.decode(errors="replace").strip()
        return int(text) if NUMBER.fullmatch(text.removeprefix("-")) else text


def class_in_json(data: bytes, source: str, field: str) -> str | int | None:
    """Returns the class in the JSON next to an image, from the given field or the only field that may hold it.

    Other fields are not checked: img2dataset, for example, writes NaN scores.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{source} is {shown(values)}; it must be an object")
    fields = [field] if field else [name for name in LABEL_FIELDS if isinstance(values.get(name), str | int)]
    if len(fields) > 1:
        raise InputError(
            f"{source} has several fields that may be the class ({', '.join(fields)}): choose one, such as --labels "
            f"{fields[0]}"
        )
    if not fields:
        return None
    value = values.get(fields[0])
    if not isinstance(value, str) and not (type(value) is int and abs(value) < 2**63):
        raise InputError(f"{source} has the class {shown(value)} in {fields[0]}; expected a number from 0 or a name")
    return value


def refuse_two_images(images: list[Member], paths: Sequence[Path]) -> None:
    """Raises InputError if a WebDataset sample has several images, such as a photo and a mask."""
    first: dict[tuple[int, str], Member] = {}
    for image in images:
        other = first.setdefault(image.sample_id, image)
        if other.column != image.column:
            raise InputError(
                f"{paths[image.archive]} has two images in one sample, {other.path} and {image.path}: choose one, such "
                f"as --labels {other.column},cls"
            )


def keys_from_words(
    images: list[Member], words: list[str | int], class_names: Sequence[str] | None, paths: Sequence[Path]
) -> KeysAndLabels:
    """Makes keys CLASS/NAME, or CLASS/ARCHIVE/NAME if names repeat across archives, or else CLASS/ARCHIVE/PATH."""
    if class_names is not None:
        known = set(class_names)
        number = max((word for word in words if isinstance(word, int) and str(word) not in known), default=0)
        if number >= len(class_names):
            raise InputError(
                f"the archives ({paths[0]}, ...) have the class {number}; --class_names has {len(class_names)} names"
            )
    numbers: Numbers = "any" if any(isinstance(word, int) for word in words) else "never"
    names, labels = labels_from_words([*map(str, words)], class_names, str(paths[0]), numbers)
    stems = [paths[image.archive].stem for image in images]
    choices = (
        [image.name for image in images],
        [f"{stem}/{image.name}" for stem, image in zip(stems, images, strict=True)],
        [f"{stem}/{image.path}" for stem, image in zip(stems, images, strict=True)],
    )
    for choice in choices:
        keys = [f"{names[label]}/{name}" for label, name in zip(labels, choice, strict=True)]
        if len(set(keys)) == len(keys):
            break
    return KeysAndLabels(names, keys, labels)


def reject_samples_without_class(images: list[Member], members: list[Member], paths: Sequence[Path]) -> None:
    """Raises InputError for WebDataset shards without classes."""
    others = {member.sample_id for member in members if not is_image(member.name)}
    image = next((m for m in images if not m.inner and "/" not in m.path and m.sample_id in others), None)
    if image is not None:
        raise InputError(
            f"{paths[image.archive]} has other files next to {image.path}, but no .cls file with its class, and no "
            f"class in a .json: add one, or pass a label file with --labels"
        )


def keys_from_paths(images: list[Member], paths: Sequence[Path], class_names: Sequence[str] | None) -> KeysAndLabels:
    """Takes the class of an image from its inner archive, its folder or its archive.

    If all images are in one place, they have one class, as in a folder; it is named after the archive.

    Raises:
        InputError: if the folders may be splits rather than classes, or one of them is not among `class_names`.
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
        default = folder_class(paths[0].with_suffix(""))
        return keys_of_one_class(paths[0], default, [image.name for image in images], class_names)
    if class_names is None:
        refuse_splits(names, str(paths[0]), "pack each by itself; if they are classes, `tokenize` takes --class_names")
    return keys_of_classes(paths[0], names, keys, class_names)
