"""Files that say of which class each image is, where its place does not: those of ImageNet's validation images."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_mvar.data.classes import imagenet_classes
from lightning_mvar.errors import InputError

HEADER = "ImageId,PredictionString"  # of Kaggle's LOC_val_solution.csv
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"  # in the development kit


@dataclass(frozen=True)
class Labels:
    """Classes of images, by their names or in the names' order.

    Args:
        path: of the file.
        class_names: in label order.
        by_name: label of each image by its name without folder and suffix; empty where the file has none.
        in_order: labels of the images in the order of their names; empty where the file has names.
    """

    path: Path
    class_names: list[str]
    by_name: dict[str, int]
    in_order: list[int]

    def keyed(self, names: Sequence[str], source: Path) -> tuple[list[str], list[int]]:
        """CLASS/NAME and label of each image.

        Args:
            names: of the images, in their order.
            source: of the images, for messages.

        Raises:
            InputError: if an image has no label, or there are more or fewer labels than images.
        """
        if self.in_order:
            if len(self.in_order) != len(names):
                raise InputError(f"{self.path} has {len(self.in_order)} labels for the {len(names)} images of {source}")
            labels = self.in_order
        else:
            stems = [PurePosixPath(name).stem for name in names]
            missing = [name for name, stem in zip(names, stems, strict=True) if stem not in self.by_name]
            if missing:
                raise InputError(f"{self.path} has no label for {missing[0]} of {source}, and {len(missing)} in all")
            labels = [self.by_name[stem] for stem in stems]
        keys = [f"{self.class_names[label]}/{name}" for name, label in zip(names, labels, strict=True)]
        return keys, labels


def read_labels(path: Path, class_names: Sequence[str] | None = None) -> Labels:
    """Read a file of labels.

    Args:
        path: a text file of lines `NAME CLASS` (or separated by a comma or a tab; Kaggle's LOC_val_solution.csv is
            such a file), of lines `CLASS` in the order of the images' names, or ILSVRC2012_devkit_t12.tar.gz. A class
            is one of `class_names`, a WordNet id of ImageNet, or a number from 0.
        class_names: in label order; where not given, ImageNet's ids, or the numbers that occur.

    Raises:
        InputError: if it cannot be read, or has something else.
    """
    if not path.is_file():
        raise InputError(f"--labels {path} does not exist (or is not a file)")
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return read_development_kit(path)
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels {path} is not a text file ({error})") from error
    rows = [re.split(r"[\s,]+", line) for line in lines if line != HEADER]
    if not rows or any(len(row) < min(len(rows[0]), 2) for row in rows):
        raise InputError(f"--labels {path} must have lines `NAME CLASS`, or one CLASS a line")
    named = len(rows[0]) > 1
    words = [row[1 if named else 0] for row in rows]
    known = list(class_names) if class_names is not None else known_classes(words)
    index = {name: label for label, name in enumerate(known)} | {str(label): label for label in range(len(known))}
    wrong = [word for word in words if word not in index]
    if wrong:
        raise InputError(f"--labels {path} has the class {wrong[0]!r}, which is none of the {len(known)}")
    labels = [index[word] for word in words]
    if not named:
        return Labels(path, known, {}, labels)
    return Labels(path, known, dict(zip((PurePosixPath(row[0]).stem for row in rows), labels, strict=True)), [])


def known_classes(words: Sequence[str]) -> list[str]:
    """What classes there are, where only those that occur are known."""
    if set(words) <= imagenet_classes().keys():
        return list(imagenet_classes())
    if all(word.isdecimal() for word in words):
        if "0" not in words:
            raise InputError(
                "--labels has numbers and no 0: classes count from 0; name ILSVRC2012_devkit_t12.tar.gz itself for "
                "ImageNet's own numbers"
            )
        return [str(label) for label in range(max(map(int, words)) + 1)]
    return sorted(set(words))


def read_development_kit(path: Path) -> Labels:
    """The official labels, which are numbers of the kit's own, and what they mean."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"--labels {path} needs scipy to be read: pip install scipy") from error
    try:
        with tarfile.open(path) as kit:
            meta, truth = (read_ending(kit, ending) for ending in (META, TRUTH))
        synsets: Any = loadmat(BytesIO(meta), squeeze_me=True)["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        names = list(imagenet_classes())
        labels = [names.index(ids[int(number)]) for number in truth.split()]
    except (OSError, EOFError, KeyError, ValueError, TypeError, tarfile.TarError) as error:
        raise InputError(f"--labels {path} is not ImageNet's development kit, or is damaged ({error})") from error
    return Labels(path, names, {}, labels)


def read_ending(archive: tarfile.TarFile, ending: str) -> bytes:
    member = next((member for member in archive if member.name.endswith(ending)), None)
    file = None if member is None else archive.extractfile(member)
    if file is None:
        raise KeyError(f"no {ending}")
    return file.read()


def read_class_names(wanted: str) -> list[str]:
    """`imagenet`, or a text file with a name on each line, in label order."""
    if wanted == "imagenet":
        return list(imagenet_classes())
    path = Path(wanted)
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--class_names {path} cannot be read ({error}): `imagenet`, or a name on each line"
        ) from error
    if not names or len(set(names)) < len(names):
        raise InputError(f"--class_names {path} must have another name on each line")
    return names
