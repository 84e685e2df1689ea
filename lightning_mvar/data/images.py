"""Labelled images by index, decoded and cropped.

A source is named by one string everywhere (command line, YAML): `digits:train`, `photos:test` and the like; a folder of
class folders; a tar archive, a folder of them or a pattern such as `imagenet-train-{0000..0146}.tar`; or Parquet files.
Archives may be elsewhere (`https://...`, `pipe:...`, see `fetching`): they are copied here before they are read, for
images are read in an order of our own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from webdataset.shardlists import expand_urls

from lightning_mvar.data.archives import TarImages
from lightning_mvar.data.decoding import UNREADABLE, decode_image
from lightning_mvar.data.digits import DIGITS
from lightning_mvar.data.embedded import EmbeddedSet, Split
from lightning_mvar.data.encoded import EncodedImages, FolderImages, visible
from lightning_mvar.data.fetching import fetch_files, is_remote
from lightning_mvar.data.labels import read_class_names, read_labels
from lightning_mvar.data.parquet import ParquetImages
from lightning_mvar.data.photos import PHOTOS, PHOTOS64
from lightning_mvar.errors import InputError
from lightning_mvar.scales import Shape, in_words, shape_of

EMBEDDED = {embedded.name: embedded for embedded in (DIGITS, PHOTOS, PHOTOS64)}

RESIZE_MARGIN = 1.125  # the shorter side is resized to this times the crop (VAR's preprocessing)
LONGEST = 16  # times the shorter side; of a longer picture the middle is used, or resizing would fill the memory

IMAGE_CACHE = "outputs/image_cache"
ARCHIVES = (".tar", ".parquet")

OnCorrupt = Literal["raise", "skip"]
Crop = Literal["center", "random"]


class CorruptImageError(InputError):
    """An image file that cannot be decoded."""


@dataclass
class Example:
    """One image (3, H, W) float32 in [-1, 1]; `image` is None, and `error` says why, where it could not be read."""

    image: Tensor | None
    label: int
    key: str
    error: str | None = None


@dataclass
class ImageBatch:
    """The readable examples of a batch, and a message for each of the others."""

    images: Tensor  # (b, 3, H, W) float32 in [-1, 1]
    labels: Tensor  # (b,) int64
    keys: list[str]
    errors: list[str]
    unread: list[str]  # the keys of those others, without the number of a view


class Examples(Protocol):
    """Labelled images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Images(Examples, Protocol):
    """Labelled images of a source, each cropped at its centre."""

    class_names: list[str]
    shape: Shape

    @property
    def identity(self) -> str: ...  # changes when the images do


class ImageSource(Images, Protocol):
    """Images that can also be cropped at a random place."""

    # Of each image, a number that it shares with those it is best read together with; None where that is all the same.
    groups: NDArray[np.int64] | None

    @property
    def listing(self) -> str: ...  # the same for the same images and labels, wherever they are stored

    def cropped(self, index: int, generator: Generator) -> Example: ...

    def key(self, index: int) -> str: ...  # of its example, without reading the image


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


class EmbeddedImages:
    """A split of an embedded set. A random crop moves an image by up to the set's margin each way."""

    groups: NDArray[np.int64] | None = None

    def __init__(self, embedded: EmbeddedSet, split: Split) -> None:
        self.class_names, self.shape = list(embedded.class_names), (embedded.resolution, embedded.resolution)
        self.name, self.split, self.margin = embedded.name, split, embedded.margin
        self.wide, self.labels = embedded.load_wide(split)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.wide.numpy().tobytes()).hexdigest()

    @property
    def listing(self) -> str:
        return self.identity

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, self.margin, self.margin)

    def cropped(self, index: int, generator: Generator) -> Example:
        top, left = torch.randint(2 * self.margin + 1, (2,), generator=generator).tolist()
        return self.example(index, top, left)

    def example(self, index: int, top: int, left: int) -> Example:
        height, width = self.shape
        image = self.wide[index, :, top : top + height, left : left + width]
        return Example(image, int(self.labels[index]), self.key(index))

    def key(self, index: int) -> str:
        return f"{self.name}/{self.split}/{index:04d}"


class DecodedImages:
    """Crops of image files, all of one size.

    Args:
        encoded: the files.
        shape: height and width of the crops; the image is first resized (Lanczos) until it covers 1.125 times that,
            which makes its shorter side 1.125 times that of a square.
        on_corrupt: what a file that cannot be decoded does: raise, or come back as an `Example` with an error.
    """

    def __init__(self, encoded: EncodedImages, shape: Shape, on_corrupt: OnCorrupt) -> None:
        self.encoded, self.shape, self.on_corrupt = encoded, shape, on_corrupt
        self.class_names, self.groups = encoded.class_names, encoded.groups

    @property
    def identity(self) -> str:
        return self.encoded.identity

    @property
    def listing(self) -> str:
        return self.encoded.listing

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, None)

    def cropped(self, index: int, generator: Generator) -> Example:
        return self.example(index, generator)

    def example(self, index: int, generator: Generator | None) -> Example:
        label, key, where = int(self.encoded.labels[index]), self.key(index), self.encoded.where(index)
        try:
            data = self.encoded.read(index)
        except OSError as error:  # of the disk or the network: it says nothing against the image
            raise InputError(f"{where} cannot be read ({error}): start again once it can") from error
        try:
            image = decode_image(data)
        except UNREADABLE as error:
            message = f"{where} cannot be decoded ({error})"
            if self.on_corrupt == "skip":
                return Example(None, label, key, message)
            raise CorruptImageError(
                f"{message}: repair or remove it (or skip it, where the command has --on_corrupt)"
            ) from error
        return Example(to_tensor(self.cut(image, generator)), label, key)

    def key(self, index: int) -> str:
        return self.encoded.key(index)

    def cut(self, image: Image.Image, generator: Generator | None) -> Image.Image:
        """Resize, and crop: where the generator says, else at the centre."""
        image = middle(image, LONGEST * min(image.size))
        crop = self.shape[::-1]  # width and height, as Pillow has sizes
        scale = max(round(RESIZE_MARGIN * least) / side for least, side in zip(crop, image.size, strict=True))
        width, height = (max(round(side * scale), least) for least, side in zip(crop, image.size, strict=True))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        room = (width - crop[0], height - crop[1])
        if generator is None:
            left, top = (side // 2 for side in room)
        else:
            left, top = (int(torch.randint(side + 1, (), generator=generator)) for side in room)
        return image.crop((left, top, left + crop[0], top + crop[1]))


def middle(image: Image.Image, longest: int) -> Image.Image:
    """A picture without what its longer side has beyond `longest` pixels, at both ends alike."""
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image


def find_by_key(source: ImageSource, views: int, seed: int, flips: bool, keys: Sequence[str]) -> list[Example | None]:
    """The examples, as they were tokenized, that have these keys; None for a key that the source has not.

    Args:
        source: of the images.
        views: of each, whose number follows a "#" in the key where there are more than one.
        seed: of the views.
        flips: whether half of them are mirrored.
        keys: as the shards have them.
    """
    examples: Examples = source if views == 1 else Views(source, views, seed, flips)
    images = [key if views == 1 else key.rpartition("#")[0] for key in keys]
    wanted = set(images)
    numbers = {key: index for index in range(len(source)) if (key := source.key(index)) in wanted}
    view = [0 if views == 1 else int(key.rpartition("#")[2]) for key in keys]
    places = [numbers.get(image) for image in images]
    return [None if i is None else examples[i * views + v] for i, v in zip(places, view, strict=True)]


class Views:
    """Several random crops of every image of a source: `views` times as many examples.

    Example i is drawn from (seed, i) alone, so it is the same in any process and after any interruption.

    Args:
        source: the images.
        views: crops of each.
        seed: of the crops.
        flips: mirror half of them, at random.
    """

    def __init__(self, source: ImageSource, views: int, seed: int, flips: bool = False) -> None:
        self.source, self.views, self.seed, self.flips = source, views, seed, flips

    def __len__(self) -> int:
        return len(self.source) * self.views

    def __getitem__(self, index: int) -> Example:
        image, view = divmod(index, self.views)
        generator = generator_for(self.seed, index)
        example = self.source.cropped(image, generator)
        if example.image is None:
            return example  # an image is told of once, whatever the views
        if self.flips and torch.rand((), generator=generator) < 0.5:
            example = replace(example, image=example.image.flip(2))
        return replace(example, key=f"{example.key}#{view}")


def generator_for(*key: int) -> Generator:
    """One that draws what the key alone decides. (To seed torch's own generator takes a thousand times as long.)"""
    return Generator().manual_seed(random.Random("-".join(map(str, key))).getrandbits(63))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def image_loader(
    images: Examples, batch_size: int, num_workers: int, chosen: Sequence[int] | None = None
) -> DataLoader[ImageBatch]:
    """Batches of all images in order, or of those `chosen` by number, read in processes, or in this one for 0."""
    numbers = range(len(images)) if chosen is None else chosen
    return batch_loader(images, batched(numbers, batch_size), num_workers)


def batched(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]


def batch_loader(images: Examples, batches: Iterable[Sequence[int]], num_workers: int) -> DataLoader[ImageBatch]:
    """Batches of the images with these numbers, read in processes, two batches of each ahead, or in this one for 0."""
    return DataLoader[Example](  # type: ignore[return-value]  # which are collated
        images,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),  # not the global one: reading must not change what is drawn elsewhere
    )


def collate(examples: list[Example]) -> ImageBatch:
    """Stack the readable examples; keep the others' messages."""
    good = [example for example in examples if example.image is not None]
    images = [cast(Tensor, example.image) for example in good]
    return ImageBatch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([example.label for example in good], dtype=torch.int64),
        [example.key for example in good],
        [example.error for example in examples if example.error is not None],
        [example.key for example in examples if example.error is not None],
    )
