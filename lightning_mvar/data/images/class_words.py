"""Labels from class words: the names or numbers in label files, WebDataset members and tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from lightning_mvar.data.classes import imagenet_classes
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import read_regular

MAX_CLASSES = 1_000_000  # if classes only have numbers
MAX_LABEL_FILE_BYTES = 2**28  # of a label file: ImageNet's training images take 60 MB
NUMBER = re.compile(r"\d{1,18}", re.ASCII)
DECIMAL = re.compile(r"-?\d+\.\d*", re.ASCII)
Numbers = Literal["from_zero", "any", "never"]
LABEL_FIELDS = (  # names of columns or JSON fields that hold the class
    *("label", "labels", "cls", "class", "class_id", "class_name", "class_label", "label_name", "classname"),
    *("category", "target", "synset", "wnid", "fine_label", "coarse_label"),
)


class KeysAndLabels(NamedTuple):
    """Class names in label order, and the key and label of each image."""

    class_names: list[str]
    keys: list[str]
    labels: list[int]


def labels_from_words(
    words: Sequence[str], class_names: Sequence[str] | None, source: str, numbers: Numbers
) -> tuple[list[str], list[int]]:
    """Returns the class names in label order and the label of each word.

    Args:
        words: class of each image: one of `class_names`, a WordNet id of ImageNet, another name, or a number from 0. A
            word is first looked up as a name.
        class_names: by default ImageNet's ids, or the classes that occur.
        source: names the words in messages.
        numbers: whether words that are all numbers are labels; `from_zero` refuses them if none is 0, because they may
            be counted from 1.

    Raises:
        InputError: if a word is unknown, or the words are ambiguous.
    """
    found = dict.fromkeys(words)
    for word in found:
        if not word or not word.isprintable():
            raise InputError(f"{source} has the class {word!r}: a class is a number or a printable name")
    if class_names is None:
        names = infer_classes(found.keys(), source, numbers)
        as_numbers = {word: int(word) for word in found} if numbers != "never" and numbered(found) else {}
    else:
        names = list(class_names)
        as_numbers = {word: int(word) for word in found if NUMBER.fullmatch(word) and int(word) < len(names)}
    by_name = {name: label for label, name in enumerate(names)}
    known = by_name if found.keys() <= by_name.keys() else as_numbers | by_name
    unknown = [word for word in found if word not in known]
    if unknown:
        raise InputError(f"{source} has the class {unknown[0]!r}, which is not one of the {len(names)} classes")
    if class_names is not None and known is not by_name and any(NUMBER.fullmatch(name) for name in names):
        number = next(word for word in found if word not in by_name)
        raise InputError(
            f"{source} has the class {number!r}, which is not a name of --class_names, whereas others are: use either "
            f"names or numbers"
        )
    return names, [known[word] for word in words]


def infer_classes(words: Collection[str], source: str, numbers: Numbers) -> list[str]:
    """Infers the classes from the words that occur: ImageNet's, numbers from 0, or the sorted names."""
    if set(words) <= imagenet_classes().keys():
        return list(imagenet_classes())
    if numbers == "never":
        return sorted(words)
    negative = [word for word in words if word.startswith("-")]
    if negative and all(NUMBER.fullmatch(word.removeprefix("-")) for word in words):
        raise InputError(
            f"{source} has the class {negative[0]}, but numbers count from 0: remove images without a class, or list "
            f"the names with --class_names"
        )
    if all(DECIMAL.fullmatch(word) for word in words):
        raise InputError(
            f"{source} has the class {min(words)}, but class numbers are integers: write them without a decimal point, "
            f"or list the names with --class_names"
        )
    if names := numbered(words):
        if numbers == "from_zero" and int(min(words, key=int)) > 0:
            raise InputError(
                f"{source} has class numbers but no 0: classes count from 0; for ImageNet's own numbers pass "
                f"ILSVRC2012_devkit_t12.tar.gz itself, and if they are names, list them with --class_names"
            )
        if len({int(word) for word in words}) < len(words):
            ordered = sorted(words, key=int)
            first, second = next((a, b) for a, b in pairwise(ordered) if int(a) == int(b))
            raise InputError(f"{source} has the classes {first!r} and {second!r}: list the names with --class_names")
        return names
    return sorted(set(words))


def numbered(words: Iterable[str]) -> list[str]:
    """Returns the names 0, 1, 2, ... up to the largest of `words`; an empty list unless all are numbers."""
    if not all(NUMBER.fullmatch(word) for word in words):
        return []
    count = max(int(word) for word in words) + 1
    if count > MAX_CLASSES:
        raise InputError(f"there is a class {count - 1}; numbers go up to {MAX_CLASSES - 1}")
    return [str(label) for label in range(count)]


def read_class_names(name_or_path: str) -> list[str]:
    """Returns class names in label order: ImageNet's for `imagenet`, or those in a text file, one per line."""
    if name_or_path == "imagenet":
        return list(imagenet_classes())
    path = Path(name_or_path)
    try:
        names = read_lines(path)
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(
            f"--class_names {path} cannot be read ({error}): use `imagenet` or a text file with one name per line"
        ) from error
    if not names or len(set(names)) < len(names):
        raise InputError(f"--class_names {path} must have one name per line, each different")
    return names


def read_lines(path: Path) -> list[str]:
    """Returns the non-blank lines of a text file, stripped.

    Raises:
        InputError: if the file cannot be read or is larger than `MAX_LABEL_FILE_BYTES`.
        UnicodeDecodeError: if it is not UTF-8.
    """
    data = read_regular(path, MAX_LABEL_FILE_BYTES)
    return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
