"""Opening images by one string, the same everywhere (command line, YAML).

A source is `digits:train`, `photos:test` and the like; a folder of class folders; a tar archive, a folder of them or a
pattern such as `imagenet-train-{0000..0146}.tar`; or Parquet files. Archives may be elsewhere (`https://...`,
`pipe:...`, see `fetching`): they are copied here before they are read, for images are read in an order of our own.
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
from lightning_mvar.scales import Shape, in_words, shape_of

EMBEDDED = {embedded.name: embedded for embedded in (DIGITS, PHOTOS, PHOTOS64)}

IMAGE_CACHE = "outputs/image_cache"
ARCHIVES = (".tar", ".parquet")


def open_images(
    source: str,
    size: int | Shape,
    on_corrupt: OnCorrupt = "raise",
    labels: str | None = None,
    class_names: str | None = None,
    cache_dir: str = IMAGE_CACHE,
    retries: int = 5,
) -> ImageSource:
    """The images that `source` names, all of one size.

    Args:
        source: see above.
        size: side of the crops in pixels, or their (height, width).
        on_corrupt: what an image that cannot be decoded does: raise, or come back as an `Example` with an error.
        labels: a file that tells the classes of images whose place does not; see `read_labels`.
        class_names: what the classes are called that are numbers in the source: `imagenet`, or a file with a name on
            each line.
        cache_dir: folder on this machine for archives from elsewhere.
        retries: attempts to read one from elsewhere, after one that failed.

    Raises:
        InputError: if there is no such source, it holds no images, or they are of another size.
    """
    embedded, shape = embedded_in(source), shape_of(size)
    if embedded is None:
        names = None if class_names is None else read_class_names(class_names)
        return DecodedImages(open_encoded(source, labels, names, cache_dir, retries), shape, on_corrupt)
    if labels is not None or class_names is not None:
        raise InputError(f"{source} has its own labels and classes: leave out --labels and --class_names")
    images = EmbeddedImages(*embedded)
    if shape != images.shape:
        raise InputError(f"{source} are {in_words(images.shape)}, but {in_words(shape)} pixels are asked for")
    return images


def open_encoded(
    source: str,
    labels: str | None,
    class_names: list[str] | None,
    cache_dir: str = IMAGE_CACHE,
    retries: int = 5,
) -> EncodedImages:
    """Image files in a folder or in archives."""
    given = None if labels is None else read_labels(Path(labels), class_names)
    paths = files_of(source, Path(cache_dir), retries)
    if all(path.suffix == ".tar" for path in paths) and paths:
        return TarImages(paths, given, class_names)
    if given is not None and paths:
        raise InputError(f"--labels is for images without classes: {source} has a column of labels")
    if paths:
        return ParquetImages(paths, class_names)
    if class_names is not None and given is None:
        raise InputError(f"--class_names is for sources with numbers: the classes of {source} are its folders")
    return FolderImages(Path(source), given)


def files_of(source: str, cache_dir: Path, retries: int) -> list[Path]:
    """The archives or Parquet files that `source` names: one, those of a folder, or of a pattern, which may have to be
    fetched; none for a folder of images.

    Raises:
        InputError: if there is no such file or folder.
    """
    if is_remote(source):
        return only_archives(fetch_files(expand_urls(source), cache_dir, retries))
    path = Path(source)
    if path.is_dir():
        inside = sorted(visible(path.iterdir()))
        found = [p for p in inside if p.suffix == ".tar"] or [p for p in inside if p.suffix == ".parquet"]
        if found and any(p.is_dir() for p in inside):
            raise InputError(f"{source} has folders and {found[0].name}: name the archives by a pattern, or move them")
        return found
    expanded = [found for part in expand_urls(source) for found in (sorted(glob(part)) or [part])]
    paths = [Path(found) for found in expanded]
    missing = [found for found in paths if not found.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]} does not exist (or is not a file): name a folder, .tar or .parquet files, or digits:train"
        )
    return only_archives(paths)


def only_archives(paths: list[Path]) -> list[Path]:
    """Raise InputError unless these are all tar archives, or all Parquet files."""
    if len({found.suffix for found in paths}) > 1 or paths[0].suffix not in ARCHIVES:
        raise InputError(f"{paths[0]} is neither a folder of class folders, nor a .tar, nor a .parquet file")
    return paths


def embedded_in(source: str) -> tuple[EmbeddedSet, Split] | None:
    """The embedded set that `source` names, and its split, not yet checked; None where it names something else."""
    name, colon, split = source.partition(":")
    return (EMBEDDED[name], cast(Split, split)) if colon and name in EMBEDDED else None
