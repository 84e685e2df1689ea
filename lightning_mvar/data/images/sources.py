"""Opens images from a source string, as given on the command line and in YAML.

A source is an embedded set such as `digits:train` or `photos:test`; a folder of class folders; a tar archive, a folder
of them or a pattern such as `imagenet-train-{0000..0146}.tar`; or Parquet files. Remote archives (`https://...` or
`pipe:...`, see `lightning_mvar.io.fetch`) are downloaded first, because images are read in random order.
"""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import cast

from webdataset.shardlists import expand_urls

from lightning_mvar.data.builtin.base import EmbeddedSet, Split
from lightning_mvar.data.builtin.digits import DIGITS
from lightning_mvar.data.builtin.photos import PHOTOS, PHOTOS64
from lightning_mvar.data.images.archives import TarImages
from lightning_mvar.data.images.crops import DecodedImages, EmbeddedImages
from lightning_mvar.data.images.examples import ImageSource, OnCorrupt
from lightning_mvar.data.images.files import EncodedImages, FolderImages, visible
from lightning_mvar.data.images.labels import read_class_names, read_labels
from lightning_mvar.data.images.parquet import ParquetImages
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import fetch_files, is_remote
from lightning_mvar.scales import Shape, format_shape, shape_of

EMBEDDED_SETS = {embedded.name: embedded for embedded in (DIGITS, PHOTOS, PHOTOS64)}

IMAGE_CACHE = "outputs/image_cache"
ARCHIVE_SUFFIXES = (".tar", ".parquet")


def open_images(
    source: str,
    size: int | Shape,
    on_corrupt: OnCorrupt = "raise",
    labels: str | None = None,
    class_names: str | None = None,
    cache_dir: str = IMAGE_CACHE,
    retries: int = 5,
) -> ImageSource:
    """Opens the images of a source, cropped to one size.

    Args:
        source: see the module docstring.
        size: side of the crops in pixels, or their (height, width).
        on_corrupt: raise if an image cannot be decoded, or return an `Example` with an error.
        labels: label file, for images that are not sorted by class; see `read_labels`.
        class_names: names of classes that are numbers in the source: `imagenet`, or a text file with one name per line.
        cache_dir: local folder for downloaded archives.
        retries: further attempts after a failed download.

    Raises:
        InputError: if the source does not exist, has no images, or its images are of another size.
    """
    embedded, shape = find_embedded_set(source), shape_of(size)
    if embedded is None:
        names = None if class_names is None else read_class_names(class_names)
        return DecodedImages(open_encoded(source, labels, names, cache_dir, retries), shape, on_corrupt)
    if labels is not None or class_names is not None:
        raise InputError(f"{source} has its own labels and classes: leave out --labels and --class_names")
    images = EmbeddedImages(*embedded)
    if shape != images.shape:
        raise InputError(
            f"{source} are {format_shape(images.shape)} images, but {format_shape(shape)} pixels were requested"
        )
    return images


def open_encoded(
    source: str,
    labels: str | None,
    class_names: list[str] | None,
    cache_dir: str = IMAGE_CACHE,
    retries: int = 5,
) -> EncodedImages:
    """Opens the image files of a folder or of archives."""
    label_file = None if labels is None else read_labels(Path(labels), class_names)
    paths = resolve_files(source, Path(cache_dir), retries)
    if all(path.suffix == ".tar" for path in paths) and paths:
        return TarImages(paths, label_file, class_names)
    if label_file is not None and paths:
        raise InputError(f"{source} has a label column: leave out --labels")
    if paths:
        return ParquetImages(paths, class_names)
    if class_names is not None and label_file is None:
        raise InputError(f"the classes of {source} are named by its folders: leave out --class_names")
    return FolderImages(Path(source), label_file)


def resolve_files(source: str, cache_dir: Path, retries: int) -> list[Path]:
    """Returns the archives or Parquet files of a file name, pattern, folder or remote address; downloads remote ones.

    The list is empty for a folder of images.

    Raises:
        InputError: if the file or folder does not exist.
    """
    if is_remote(source):
        return check_archives(fetch_files(expand_urls(source), cache_dir, retries))
    path = Path(source)
    if path.is_dir():
        entries = sorted(visible(path.iterdir()))
        archives = [p for p in entries if p.suffix == ".tar"] or [p for p in entries if p.suffix == ".parquet"]
        if archives and any(p.is_dir() for p in entries):
            raise InputError(
                f"{source} has folders and {archives[0].name}: select the archives with a pattern, or move them"
            )
        return archives
    paths = [Path(name) for part in expand_urls(source) for name in (sorted(glob(part)) or [part])]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]} does not exist (or is not a file): use a folder, .tar or .parquet files, or digits:train"
        )
    return check_archives(paths)


def check_archives(paths: list[Path]) -> list[Path]:
    """Returns `paths`; raises InputError unless all are tar archives or all are Parquet files."""
    if len({path.suffix for path in paths}) > 1 or paths[0].suffix not in ARCHIVE_SUFFIXES:
        raise InputError(f"{paths[0]} is neither a folder of class folders nor a .tar or .parquet file")
    return paths


def find_embedded_set(source: str) -> tuple[EmbeddedSet, Split] | None:
    """Returns the embedded set and the unchecked split that `source` names; None if it names no embedded set."""
    name, colon, split = source.partition(":")
    return (EMBEDDED_SETS[name], cast(Split, split)) if colon and name in EMBEDDED_SETS else None
