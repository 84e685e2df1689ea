"""Label files for images that are not sorted by class, such as ImageNet's validation images."""

from __future__ import annotations

import csv
import re
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_mvar.data.classes import imagenet_classes
from lightning_mvar.data.images.class_words import LABEL_FIELDS, KeysAndLabels, labels_from_words, read_lines
from lightning_mvar.data.images.decoding import SUFFIXES
from lightning_mvar.data.images.names import Skipped, without_suffix
from lightning_mvar.errors import InputError, require_package

META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"  # in the development kit
MAX_KIT_MEMBERS, MAX_KIT_BYTES = 1000, 2**24  # the kit has 2.5 MB
MAT_HEADER, MAT_COMPRESSED = 128, 15  # bytes of a MATLAB 5 file; kind of a compressed variable
KIT_ERRORS = (  # raised by tarfile and scipy for damaged files; MemoryError: scipy allocates the claimed size
    *(OSError, EOFError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError, struct.error, zlib.error),
    tarfile.TarError,
)
NAME_FIELDS = {
    *("imageid", "image_id", "image", "images", "img", "name", "file", "filename", "file_name", "path", "filepath"),
    *("file_path", "image_path", "image_name", "id", "key"),
}
CLASS_FIELDS = {*LABEL_FIELDS, "predictionstring"}
CLASS_AND_BOX = re.compile(r"(n\d{8})( \d+)+")  # in Kaggle's LOC_val_solution.csv
SEPARATOR = re.compile(r"[\s,;]+")
NAME_WITH_SUFFIX = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, SUFFIXES))}))[\s,;]+(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Labels:
    """A label file whose lines are assigned to images by name, or in the sorted order of the names.

    Args:
        path: the label file.
        lines: its lines.
        class_names: class names in label order; by default ImageNet's ids, or the classes that occur in the file.
    """

    path: Path
    lines: Sequence[str]
    class_names: Sequence[str] | None

    def assign(self, names: Sequence[str], source: Path, skipped: Skipped) -> KeysAndLabels:
        """Returns the class names and, for each image, its key CLASS/NAME and its label.

        Args:
            names: image names without folders, in sorted order.
            source: source of the images, for messages.
            skipped: counts the lines without an image.

        Raises:
            InputError: if an image has no label or two of them, the numbers of labels and images differ, or the file is
                ambiguous.
        """
        rows = self.rows_of(names)
        words = self.words_in_order(names, source) if rows is None else [word for _, word in rows]
        classes, labels = labels_from_words(words, self.class_names, f"--labels {self.path}", "from_zero")
        if rows is not None:
            labels = self.match([name for name, _ in rows], labels, classes, names, source, skipped)
        keys = [f"{classes[label]}/{name}" for label, name in zip(labels, names, strict=True)]
        return KeysAndLabels(classes, keys, labels)

    def rows_of(self, names: Sequence[str]) -> list[tuple[str, str]] | None:
        """Returns name and class in each line except the header; None if the lines contain no names.

        Of several separators, it uses the one with which most names are those of images.
        """
        known = {*names, *map(without_suffix, names)}
        best: list[list[str]] = []
        most = 0
        for separate in (by_tab, by_comma, after_suffix, by_blank):
            rows = [separate(line) for line in self.lines]
            matches = sum(len(row) > 1 and is_known(row[0], known) for row in rows)
            if matches > most and len({len(row) for row in rows}) == 1:
                best, most = rows, matches
        if not most:
            return None
        header = [field.lower() for field in best[0]]
        if header[0] in NAME_FIELDS and not is_known(best[0][0], known):
            column, best = self.class_column(header), best[1:]
        else:
            column = 1
            self.check_first_line(best, known)
        return [(row[0], class_without_box(row[column])) for row in best]

    def class_column(self, header: list[str]) -> int:
        """Returns the index of the class column in a header."""
        columns = [i for i, field in enumerate(header) if i and field in CLASS_FIELDS] or [*range(1, len(header))]
        if len(columns) > 1:
            choices = ", ".join(header[i] for i in columns)
            raise InputError(f"--labels {self.path} has several columns that may be the class ({choices}): keep one")
        return columns[0]

    def check_first_line(self, rows: list[list[str]], known: set[str]) -> None:
        """Raises InputError if the first line may be a header, or a column after the second may be the class."""
        words = Counter(row[1] for row in rows)
        valid = {*(imagenet_classes() if self.class_names is None else self.class_names)}
        if len(rows[0]) > 2 and not {class_without_box(word) for word in words} <= valid:
            raise InputError(
                f"--labels {self.path} has {len(rows[0])} columns and no header: keep two, the name and the class"
            )
        name, word = rows[0][:2]
        if not is_known(name, known) and words[word] == 1 and class_without_box(word) not in valid:
            raise InputError(
                f"the first line of --labels {self.path} ({name}, {word}) names no image, and its class occurs only "
                f"there: remove it if it is a header, or list the classes with --class_names"
            )

    def match(
        self,
        row_names: list[str],
        row_labels: list[int],
        classes: list[str],
        names: Sequence[str],
        source: Path,
        skipped: Skipped,
    ) -> list[int]:
        """Returns the label of each image, given the names and labels of the lines."""
        stems = Counter(map(without_suffix, names))
        index_of = {without_suffix(name): i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
        found: dict[int, int] = {}
        for row_name, label in zip(row_names, row_labels, strict=True):
            name = base_name(row_name)
            index = index_of.get(name, index_of.get(without_suffix(name)))
            if index is None:
                skipped.add("lines of the label file that name no image", row_name)
            elif names[index] != name and stems[without_suffix(names[index])] > 1:
                raise InputError(f"--labels {self.path}: {row_name} may be several images of {source}: add the suffix")
            elif found.setdefault(index, label) != label:
                two = f"{classes[found[index]]!r} and {classes[label]!r}"
                raise InputError(f"--labels {self.path} gives {row_name} two classes, {two}: keep one")
        missing = [name for i, name in enumerate(names) if i not in found]
        if missing:
            raise InputError(f"{self.path} has no label for {len(missing)} image(s) of {source}, such as {missing[0]}")
        return [found[i] for i in range(len(names))]

    def words_in_order(self, names: Sequence[str], source: Path) -> list[str]:
        """Returns the lines, which are the classes of the images in order."""
        lines, known = [*self.lines], {*names, *map(without_suffix, names)}
        if doubtful := next(
            (line for line in lines if any(is_known(f, known) for f in SEPARATOR.split(line)[1:])), None
        ):
            raise InputError(f"--labels {self.path} has the line {doubtful!r}: put the name before the class")
        if lines[0].lower() in CLASS_FIELDS and len(lines) == len(names) + 1:
            del lines[0]
        first_words = [line.split()[0] for line in lines]
        is_in_order = first_words == lines or set(lines) <= set(self.class_names or [])
        if not is_in_order and (len(lines) != len(names) or len(set(first_words)) == len(lines)):
            raise InputError(
                f"{self.path} has no label for {len(names)} image(s) of {source}, such as {names[0]}: it must have "
                f"lines `NAME CLASS`, or `CLASS` with the names of --class_names"
            )
        if len(lines) != len(names):
            raise InputError(f"{self.path} has {len(lines)} labels for the {len(names)} images of {source}")
        return lines


def by_tab(line: str) -> list[str]:
    return [field.strip() for field in line.split("\t")]


def by_comma(line: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]
    except csv.Error:  # an enormous field
        return []


def after_suffix(line: str) -> list[str]:
    match = NAME_WITH_SUFFIX.fullmatch(line)
    return line.split(None, 1) if match is None else [*match.groups()]  # a header has no suffix


def by_blank(line: str) -> list[str]:
    return line.split(None, 1)


def is_known(name: str, known: set[str]) -> bool:
    """Returns whether a name in a label file belongs to an image, with or without its folder and suffix."""
    return base_name(name) in known or without_suffix(base_name(name)) in known


def base_name(name: str) -> str:
    return PurePosixPath(name).name


def class_without_box(word: str) -> str:
    match = CLASS_AND_BOX.fullmatch(word)
    return word if match is None else match[1]


def read_labels(path: Path, class_names: Sequence[str] | None = None) -> Labels:
    """Reads a label file.

    Args:
        path: a text file with lines `NAME CLASS`, separated by blanks, tabs or commas, CSV with a header, lines `CLASS`
            in the order of the image names, or ILSVRC2012_devkit_t12.tar.gz. A class is one of `class_names`, a WordNet
            id of ImageNet, another name, or a number from 0.
        class_names: see `Labels`.

    Raises:
        InputError: if the file cannot be read.
    """
    if not path.is_file():
        raise InputError(f"--labels {path} does not exist (or is not a file)")
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return read_development_kit(path)
    try:
        lines = read_lines(path)
    except UnicodeDecodeError as error:
        raise InputError(f"--labels {path} is not a text file ({error})") from error
    if not lines:
        raise InputError(f"--labels {path} is empty: it must have lines `NAME CLASS` or lines `CLASS`")
    return Labels(path, lines, class_names)


def read_development_kit(path: Path) -> Labels:
    """Reads ImageNet's official validation labels and translates the kit's own class numbers."""
    require_package("scipy", "report", f"reading --labels {path}")
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        if path.stat().st_size > MAX_KIT_BYTES:
            raise OSError("it is too large")
        with tarfile.open(path) as kit:
            meta, truth = (read_member(kit, suffix) for suffix in (META, GROUND_TRUTH))
        require_small(meta)
        synsets: Any = loadmat(BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        words = [ids[int(number)] for number in truth.split()]
        if not words:
            raise KeyError(f"no labels in {GROUND_TRUTH}")
    except (*KIT_ERRORS, MatReadError) as error:
        raise InputError(f"--labels {path} is not ImageNet's development kit, or is damaged ({error})") from error
    return Labels(path, words, list(imagenet_classes()))


def require_small(meta: bytes) -> None:
    """Raises OSError if the compressed variables of a MATLAB 5 file have more than `MAX_KIT_BYTES` in total.

    After a header, the file is a list of variables, each preceded by its kind and length.
    """
    position, left, order = MAT_HEADER, MAX_KIT_BYTES, "<" if meta[MAT_HEADER - 2 : MAT_HEADER] == b"IM" else ">"
    while position + 8 <= len(meta):
        kind, length = struct.unpack_from(f"{order}II", meta, position)
        position += 8
        if kind == MAT_COMPRESSED:
            left -= len(zlib.decompressobj().decompress(meta[position : position + length], left + 1))
        if left < 0:
            raise OSError(f"{META} has more than {MAX_KIT_BYTES} bytes after decompression")
        position += length


def read_member(archive: tarfile.TarFile, suffix: str) -> bytes:
    members = (member for member, _ in zip(archive, range(MAX_KIT_MEMBERS), strict=False))
    member = next((member for member in members if member.name.endswith(suffix)), None)
    file = None if member is None else archive.extractfile(member)
    if member is None or file is None or member.size > MAX_KIT_BYTES:
        raise KeyError(f"no {suffix}")
    return file.read()
