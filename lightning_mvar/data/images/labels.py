"""Label files for images that are not sorted by class, such as ImageNet's validation images."""

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
META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"  # in the development kit


@dataclass(frozen=True)
class Labels:
    """Labels of images, by image name or in the sorted order of the names.

    Args:
        path: the label file.
        class_names: class names in label order.
        by_name: label by image name without folder and suffix; empty if the file has no names.
        in_order: labels in the order of the image names; empty if the file has names.
    """

    path: Path
    class_names: list[str]
    by_name: dict[str, int]
    in_order: list[int]

    def assign(self, names: Sequence[str], source: Path) -> tuple[list[str], list[int]]:
        """Returns the key CLASS/NAME and the label of each image.

        Args:
            names: image names, in sorted order.
            source: source of the images, for messages.

        Raises:
            InputError: if an image has no label, or the numbers of labels and images differ.
        """
        if self.in_order:
            if len(self.in_order) != len(names):
                raise InputError(f"{self.path} has {len(self.in_order)} labels for the {len(names)} images of {source}")
            labels = self.in_order
        else:
            stems = [PurePosixPath(name).stem for name in names]
            missing = [name for name, stem in zip(names, stems, strict=True) if stem not in self.by_name]
            if missing:
                raise InputError(
                    f"{self.path} has no label for {len(missing)} image(s) of {source}, such as {missing[0]}"
                )
            labels = [self.by_name[stem] for stem in stems]
        keys = [f"{self.class_names[label]}/{name}" for name, label in zip(names, labels, strict=True)]
        return keys, labels


def read_labels(path: Path, class_names: Sequence[str] | None = None) -> Labels:
    """Reads a label file.

    Args:
        path: a text file with lines `NAME CLASS` (also separated by comma or tab, such as Kaggle's
            LOC_val_solution.csv) or lines `CLASS` in the order of the image names, or ILSVRC2012_devkit_t12.tar.gz. A
            class is one of `class_names`, a WordNet id of ImageNet, or a number from 0.
        class_names: class names in label order; by default ImageNet's ids, or the classes that occur in the file.

    Raises:
        InputError: if the file cannot be read or is of another format.
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
        raise InputError(f"--labels {path} must have lines `NAME CLASS` or lines `CLASS`")
    has_names = len(rows[0]) > 1
    words = [row[1 if has_names else 0] for row in rows]
    classes = list(class_names) if class_names is not None else infer_classes(words)
    index = {name: label for label, name in enumerate(classes)} | {str(label): label for label in range(len(classes))}
    unknown = [word for word in words if word not in index]
    if unknown:
        raise InputError(
            f"--labels {path} has the class {unknown[0]!r}, which is not one of the {len(classes)} classes"
        )
    labels = [index[word] for word in words]
    if not has_names:
        return Labels(path, classes, {}, labels)
    return Labels(path, classes, dict(zip((PurePosixPath(row[0]).stem for row in rows), labels, strict=True)), [])


def infer_classes(words: Sequence[str]) -> list[str]:
    """Infers the list of classes from those that occur in a label file."""
    if set(words) <= imagenet_classes().keys():
        return list(imagenet_classes())
    if all(word.isdecimal() for word in words):
        if "0" not in words:
            raise InputError(
                "--labels has class numbers but no 0: classes count from 0; for ImageNet's own numbers pass "
                "ILSVRC2012_devkit_t12.tar.gz itself"
            )
        return [str(label) for label in range(max(map(int, words)) + 1)]
    return sorted(set(words))


def read_development_kit(path: Path) -> Labels:
    """Reads ImageNet's official validation labels and translates the kit's own class numbers."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"reading --labels {path} needs scipy: pip install scipy") from error
    try:
        with tarfile.open(path) as kit:
            meta, truth = (read_member(kit, suffix) for suffix in (META, GROUND_TRUTH))
        synsets: Any = loadmat(BytesIO(meta), squeeze_me=True)["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        names = list(imagenet_classes())
        labels = [names.index(ids[int(number)]) for number in truth.split()]
    except (OSError, EOFError, KeyError, ValueError, TypeError, tarfile.TarError) as error:
        raise InputError(f"--labels {path} is not ImageNet's development kit, or is damaged ({error})") from error
    return Labels(path, names, {}, labels)


def read_member(archive: tarfile.TarFile, suffix: str) -> bytes:
    member = next((member for member in archive if member.name.endswith(suffix)), None)
    file = None if member is None else archive.extractfile(member)
    if file is None:
        raise KeyError(f"no {suffix}")
    return file.read()


def read_class_names(name_or_path: str) -> list[str]:
    """Returns class names in label order, from `imagenet` or a text file with one name per line."""
    if name_or_path == "imagenet":
        return list(imagenet_classes())
    path = Path(name_or_path)
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--class_names {path} cannot be read ({error}): use `imagenet` or a text file with one name per line"
        ) from error
    if not names or len(set(names)) < len(names):
        raise InputError(f"--class_names {path} must have one name per line, each different")
    return names
