"""Opens images from a source string, as given on the command line and in YAML.

A source is an embedded set such as `digits:train` or `photos:test`; a folder of class folders, or of images of a single
class; a tar archive, possibly compressed, a folder of them or a pattern such as `imagenet-train-{0000..0146}.tar`; or
Parquet or Arrow files. Remote sources (`https://...`, `s3://...` or `pipe:...`, see `lightning_mvar.io.fetch`) are
downloaded first, because images are read in random order. SOURCE:train and SOURCE:val are about nine tenths of a source
and the rest, divided by the classes and names of the images.
"""

from __future__ import annotations

import logging
import os.path
import re
from glob import glob
from pathlib import Path
from typing import cast, get_args

from webdataset.shardlists import expand_urls

from lightning_mvar.data.builtin.base import EmbeddedSet, Split
from lightning_mvar.data.builtin.digits import DIGITS
from lightning_mvar.data.builtin.emoji import EMOJI64
from lightning_mvar.data.builtin.photos import PHOTOS, PHOTOS64
from lightning_mvar.data.images.archives import TarImages
from lightning_mvar.data.images.class_words import read_class_names
from lightning_mvar.data.images.compressed import TAR_SUFFIXES, decompressed
from lightning_mvar.data.images.crops import DecodedImages, EmbeddedImages
from lightning_mvar.data.images.examples import ImageSource, OnCorrupt
from lightning_mvar.data.images.files import EncodedImages, FolderImages, SourceSplit
from lightning_mvar.data.images.labels import read_labels
from lightning_mvar.data.images.names import SPLITS, is_image, log_once, refuse_split_files, visible
from lightning_mvar.data.images.protocols import DEFAULT_RESIZING, MARGIN, CropProtocol, Resizing
from lightning_mvar.data.images.tables import TableImages
from lightning_mvar.devices import is_first_rank
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import RETRIES, fetch_files, is_remote
from lightning_mvar.scales import Shape, format_shape, shape_of

EMBEDDED_SETS = {embedded.name: embedded for embedded in (DIGITS, PHOTOS, PHOTOS64, EMOJI64)}

IMAGE_CACHE = "outputs/image_cache"
TABLE_SUFFIXES = (".parquet", ".arrow")
ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, *TABLE_SUFFIXES)
BRACES = re.compile(r"\{([^{}]*)\}")
MAX_NAMES = 100_000  # per pattern
LETTERS = 52  # upper bound for a range of letters
COLUMNS = re.compile(r"([\w.-]+,)?[\w-]+")  # value of `labels` that names columns: LABEL or IMAGE,LABEL


def open_images(
    source: str,
    size: int | Shape,
    on_corrupt: OnCorrupt = "raise",
    labels: str | None = None,
    class_names: str | None = None,
    cache_dir: str = IMAGE_CACHE,
    retries: int = RETRIES,
    crop: CropProtocol = "var",
    margin: float = MARGIN,
) -> ImageSource:
    """Opens the images of a source, cropped to one size.

    Args:
        source: see the module docstring.
        size: side of the crops in pixels, or their (height, width).
        on_corrupt: whether an image that cannot be decoded raises or gives an `Example` with an error.
        labels: label file, for images that are not sorted by class; see `read_labels`. For archives and tables with
            several labels or images, those to use, as LABEL or IMAGE,LABEL: columns, or WebDataset's suffixes.
        class_names: `imagenet`, or a text file with one name per line, in label order: names for class numbers in the
            source, or the set of allowed folders.
        cache_dir: local folder for downloaded archives.
        retries: further attempts after a failed download.
        crop, margin: how image files are resized and cropped; see `protocols`.

    Raises:
        InputError: if the source does not exist or has no images, or its images have a fixed size other than `size`.
    """
    source, cache_dir = os.path.expanduser(source), os.path.expanduser(cache_dir)
    labels, class_names = (name and os.path.expanduser(name) for name in (labels, class_names))
    embedded, shape, resizing = find_embedded_set(source), shape_of(size), Resizing(crop, margin)
    if embedded is None:
        names = None if class_names is None else read_class_names(class_names)
        return DecodedImages(open_encoded(source, labels, names, cache_dir, retries), shape, on_corrupt, resizing)
    if labels is not None or class_names is not None:
        raise InputError(f"{source} has its own labels and classes: leave out --labels and --class_names")
    if resizing != DEFAULT_RESIZING:
        raise InputError(f"{source} has images of one size, which are not cropped: leave out {resizing.settings}")
    images = EmbeddedImages(*embedded)
    if shape != images.shape:
        raise InputError(
            f"{source} are {format_shape(images.shape)} images, but {format_shape(shape)} pixels were requested"
        )
    return images


def open_encoded(
    source: str, labels: str | None, class_names: list[str] | None, cache_dir: str = IMAGE_CACHE, retries: int = RETRIES
) -> EncodedImages:
    """Opens the image files of a folder or of archives, or of one split of them."""
    name, (source, split) = source, split_off(source)
    paths = resolve_files(source, Path(cache_dir), retries)
    columns = ""
    if paths and labels is not None and COLUMNS.fullmatch(labels) and not Path(labels).exists():
        columns = labels
    label_file = None if labels is None or columns else read_labels(Path(labels), class_names)
    images: EncodedImages
    if paths and paths[0].suffix == ".tar":
        images = TarImages(paths, label_file or columns or None, class_names)
    elif paths:
        if label_file is not None:
            raise InputError(f"{source} has a label column: leave out --labels, or use it to name the column")
        images = TableImages(paths, class_names, columns)
    else:
        images = FolderImages(Path(source), label_file, class_names)
    images.skipped.report(source)
    if split is not None:
        images.keep(split)
    if not len(images):
        reason = "" if split is None else f": {source} has too few images to hold out a tenth"
        raise InputError(f"{name} has no images{reason}")
    if is_first_rank():
        log_once(logging.INFO, f"{name}: {images.summary()}")
    return images


def split_off(source: str) -> tuple[str, SourceSplit | None]:
    """Splits SOURCE:train or SOURCE:val; the split is None if there is none or a path with the full name exists."""
    root, _, split = source.rpartition(":")
    if not root or split not in get_args(SourceSplit) or os.path.exists(source):
        return source, None
    return root, cast(SourceSplit, split)


def refuse_split(source: str) -> None:
    """Raises InputError if a source is SOURCE:train or SOURCE:val."""
    root, split = split_off(source)
    if split is not None:
        raise InputError(f"--images {source} is already a split: pass {root}")


def resolve_files(source: str, cache_dir: Path, retries: int) -> list[Path]:
    """Returns the archives or tables for a file name, pattern, folder or remote address; none for a folder of images.

    Remote files are downloaded, and compressed ones decompressed, into the cache.

    Raises:
        InputError: if the file or folder does not exist.
    """
    if is_remote(source):
        paths = check_archives(fetch_files(expand_braces(source), cache_dir, retries))
        return [decompressed(path, cache_dir) for path in paths]
    if os.path.isdir(source):  # False for a name that is too long
        return [decompressed(path, cache_dir) for path in archives_in(Path(source))]
    paths = [Path(name) for part in expand_braces(source) for name in (sorted(glob(part)) or [part])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{missing[0]!s:.200} does not exist (or is not a file): use a folder, .tar or .parquet files, or "
            f"digits:train"
        )
    return [decompressed(path, cache_dir) for path in check_archives(paths)]


def expand_braces(pattern: str) -> list[str]:
    """Expands `{0000..0146}` and `{a,b}` in a location, which may come from an untrusted manifest of token shards.

    Raises:
        InputError: if it expands to too many names, or a brace is not closed.
    """
    try:
        if max_names(pattern) <= MAX_NAMES:
            return list(expand_urls(pattern))
    except ValueError as error:
        raise InputError(f"{pattern:.200} is not a pattern of names ({error!s:.80})") from error
    raise InputError(f"{pattern:.200} expands to more than {MAX_NAMES} names")


def max_names(pattern: str) -> int:
    """Returns an upper bound for the number of names to which a pattern expands."""
    count = 1
    while groups := BRACES.findall(pattern):  # the innermost ones
        for group in groups:
            if bounds := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?", group):
                count *= abs(int(bounds[2]) - int(bounds[1])) + 1
            else:
                count *= max(group.count(",") + 1, LETTERS if ".." in group else 1)
        pattern = BRACES.sub("", pattern)
    return count


def archives_in(folder: Path) -> list[Path]:
    """Returns the archives or tables in a folder, or in the `data` folder of a repository; none if it has images.

    Raises:
        InputError: if the choice is ambiguous because there are also folders, or several splits.
    """
    entries = sorted(visible(folder.iterdir()))
    files = [path for path in entries if path.is_file() and not path.name.startswith("cache-")]  # caches of `datasets`
    found: list[Path] = []
    for suffixes in (TAR_SUFFIXES, (".parquet",), (".arrow",)):
        found = found or [path for path in files if path.name.endswith(suffixes)]
    folders = [path for path in entries if path.is_dir()]
    if found and folders:
        raise InputError(
            f"{folder} has folders as well as {found[0].name}: select the archives with a pattern, or move them"
        )
    if found:
        refuse_split_files(found, str(folder))
        return found
    if any(is_image(path.name) for path in files):
        return []
    if splits := [path.name for path in folders if path.name.lower() in SPLITS and archives_in(path)]:
        raise InputError(
            f"{folder} has the splits {', '.join(splits)}: choose one, such as --images {folder / splits[0]}"
        )
    return archives_in(folder / "data") if [path.name for path in folders] == ["data"] else []


def check_archives(paths: list[Path]) -> list[Path]:
    """Returns `paths`; raises InputError unless they are all tar archives, all Parquet or all Arrow files."""
    kinds = (TAR_SUFFIXES, ".parquet", ".arrow")
    if not any(all(path.name.endswith(suffixes) for path in paths) for suffixes in kinds):
        remedy = ": unpack it, and pass the folder" if paths[0].suffix == ".zip" else ""
        raise InputError(f"{paths[0]} is neither a folder of images nor a .tar or .parquet file{remedy}")
    return paths


def find_embedded_set(source: str) -> tuple[EmbeddedSet, Split] | None:
    """Returns the embedded set and the split (unchecked) that `source` names; None if it names no embedded set."""
    name, colon, split = source.partition(":")
    return (EMBEDDED_SETS[name], cast(Split, split)) if colon and name in EMBEDDED_SETS else None
