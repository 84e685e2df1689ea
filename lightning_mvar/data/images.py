"""Labelled images by index, from an embedded data set or from a folder of class folders.

A source is named by one string everywhere (command line, YAML): `digits:train`, `digits:test`, `photos:train`,
`photos:test`, or a folder path.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Subset

from lightning_mvar.data.digits import DIGITS
from lightning_mvar.data.embedded import RESOLUTION, EmbeddedSet, Split
from lightning_mvar.data.photos import PHOTOS
from lightning_mvar.errors import InputError

EMBEDDED = {embedded.name: embedded for embedded in (DIGITS, PHOTOS)}

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
RESIZE_MARGIN = 1.125  # the shorter side is resized to this times the crop (VAR's preprocessing)
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

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


class Examples(Protocol):
    """Labelled images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Images(Examples, Protocol):
    """Labelled images of a source, each cropped at its centre."""

    class_names: list[str]
    resolution: int

    @property
    def identity(self) -> str: ...  # changes when the images do


class ImageSource(Images, Protocol):
    """Images that can also be cropped at a random place."""

    def cropped(self, index: int, generator: Generator) -> Example: ...


def open_images(source: str, resolution: int, on_corrupt: OnCorrupt = "raise") -> ImageSource:
    """The images that `source` names, at `resolution` pixels a side.

    Raises:
        InputError: if there is no such source, it holds no images, or it has another resolution.
    """
    embedded = embedded_in(source)
    if embedded is None:
        return ImageFolder(Path(source), resolution, on_corrupt)
    if resolution != RESOLUTION:
        raise InputError(f"{source} are {RESOLUTION} x {RESOLUTION}, but {resolution} px are asked for")
    return EmbeddedImages(*embedded)


def embedded_in(source: str) -> tuple[EmbeddedSet, Split] | None:
    """The embedded set that `source` names, and its split, not yet checked; None where it names something else."""
    name, colon, split = source.partition(":")
    return (EMBEDDED[name], cast(Split, split)) if colon and name in EMBEDDED else None


class EmbeddedImages:
    """A split of an embedded set. A random crop moves an image by up to the set's margin each way."""

    def __init__(self, embedded: EmbeddedSet, split: Split) -> None:
        self.class_names, self.resolution = list(embedded.class_names), RESOLUTION
        self.name, self.split, self.margin = embedded.name, split, embedded.margin
        self.wide, self.labels = embedded.load_wide(split)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.wide.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, self.margin, self.margin)

    def cropped(self, index: int, generator: Generator) -> Example:
        top, left = torch.randint(2 * self.margin + 1, (2,), generator=generator).tolist()
        return self.example(index, top, left)

    def example(self, index: int, top: int, left: int) -> Example:
        image = self.wide[index, :, top : top + RESOLUTION, left : left + RESOLUTION]
        return Example(image, int(self.labels[index]), f"{self.name}/{self.split}/{index:04d}")


class ImageFolder:
    """`root/class/name.{png,jpg,jpeg,webp}`: classes are the folders in sorted order.

    Args:
        root: the folder of class folders.
        resolution: side of the square crop; the shorter side is first resized to 1.125 times that (Lanczos).
        on_corrupt: what a file that cannot be decoded does: raise, or come back as an `Example` with an error.
    """

    def __init__(self, root: Path, resolution: int, on_corrupt: OnCorrupt) -> None:
        if not root.is_dir():
            raise InputError(f"image folder {root} does not exist (or is not a folder)")
        self.root, self.resolution, self.on_corrupt = root, resolution, on_corrupt
        self.class_names = sorted(path.name for path in visible(root.iterdir()) if path.is_dir())
        self.files = [
            (path, label)
            for label, name in enumerate(self.class_names)
            for path in sorted(visible((root / name).rglob("*")))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise InputError(f"no images under {root}: expected {root}/CLASS/NAME with {', '.join(SUFFIXES)}")

    @property
    def identity(self) -> str:
        return identity_of(path for path, _ in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, None)

    def cropped(self, index: int, generator: Generator) -> Example:
        return self.example(index, generator)

    def example(self, index: int, generator: Generator | None) -> Example:
        path, label = self.files[index]
        key = str(path.relative_to(self.root))
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except UNREADABLE as error:
            message = f"{path} cannot be decoded ({error})"
            if self.on_corrupt == "skip":
                return Example(None, label, key, message)
            raise CorruptImageError(
                f"{message}: repair or remove it (or skip it, where the command has --on_corrupt)"
            ) from error
        return Example(to_tensor(self.cut(image, generator)), label, key)

    def cut(self, image: Image.Image, generator: Generator | None) -> Image.Image:
        """Resize the shorter side, crop a square: where the generator says, else at the centre."""
        scale = round(RESIZE_MARGIN * self.resolution) / min(image.size)
        width, height = (max(round(side * scale), self.resolution) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        room = (width - self.resolution, height - self.resolution)
        if generator is None:
            left, top = (side // 2 for side in room)
        else:
            left, top = (int(torch.randint(side + 1, (), generator=generator)) for side in room)
        return image.crop((left, top, left + self.resolution, top + self.resolution))


def visible(paths: Iterable[Path]) -> Iterator[Path]:
    """Those whose names do not begin with a dot, as unfinished files' names do."""
    return (path for path in paths if not path.name.startswith("."))


def identity_of(files: Iterable[Path]) -> str:
    """A hash of names, sizes and times of change."""
    about = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()


class Views:
    """Several random crops of every image of a source: `views` times as many examples.

    Example i is drawn from (seed, i) alone, so it is the same in any process and after any interruption.
    """

    def __init__(self, source: ImageSource, views: int, seed: int) -> None:
        self.source, self.views, self.seed = source, views, seed

    def __len__(self) -> int:
        return len(self.source) * self.views

    def __getitem__(self, index: int) -> Example:
        image, view = divmod(index, self.views)
        example = self.source.cropped(image, generator_for(self.seed, index))
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
    return DataLoader[Example](  # type: ignore[return-value]  # which are collated
        images if chosen is None else Subset(images, chosen),  # type: ignore[arg-type]
        batch_size=batch_size,
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
    )
