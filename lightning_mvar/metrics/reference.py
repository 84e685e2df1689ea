"""References: real images that samples are scored against, named by one string, with cached statistics."""

from __future__ import annotations

import hashlib
import os.path
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_mvar.data.builtin.base import EmbeddedSet, Split
from lightning_mvar.data.images.examples import OnCorrupt, spaced_evenly
from lightning_mvar.data.images.protocols import DEFAULT_RESIZING, MARGIN, CropProtocol, Resizing
from lightning_mvar.data.images.sources import ARCHIVE_SUFFIXES, IMAGE_CACHE, find_embedded_set, open_images, split_off
from lightning_mvar.data.tokens.manifest import MANIFEST
from lightning_mvar.data.tokens.sources import open_shards
from lightning_mvar.devices import is_first_rank, object_from_rank_zero
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import RETRIES, fetch_files, is_remote, remote_file_name
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.io.known_files import ADM_REFERENCES
from lightning_mvar.io.npz import array_names
from lightning_mvar.metrics.image_sets import DecodedShards, ImageSet, SourceImages
from lightning_mvar.metrics.summary import Features, Summary, describe_extractor, feed_shard
from lightning_mvar.sampling.readers import NpzSamples
from lightning_mvar.scales import Shape, format_shape, shape_of
from lightning_mvar.tokenizer.tokenizer import Tokenizer

MAX_REAL_FEATURES = 10_000  # real images whose features are compared with samples, as in the published protocol


@dataclass(frozen=True)
class Reference:
    """Real images, or their statistics; created by `open_reference`.

    Args:
        name: value of `--reference`.
        kind: an embedded or external image source, token shards, or an npz.
        embedded: the embedded set and its split, if the source is one.
        arrays: array names, if the reference is an npz.
        resizing: how image files are resized and cropped; published statistics must have used the same.
        on_corrupt: raise if an image file cannot be decoded, or skip it.
    """

    name: str
    kind: Literal["images", "shards", "npz"]
    embedded: tuple[EmbeddedSet, Split] | None = None
    arrays: tuple[str, ...] = ()
    resizing: Resizing = DEFAULT_RESIZING
    on_corrupt: OnCorrupt = "raise"

    @property
    def has_images(self) -> bool:
        """Whether there are images, not only statistics."""
        return self.kind != "npz" or "arr_0" in self.arrays

    def check_classes(self, class_names: list[str]) -> None:
        """Raises InputError if token shards do not have a network's `class_names`, in the same order."""
        if self.kind == "shards" and class_names:
            open_shards(self.name).manifest().check_classes(self.name, class_names)

    def feature_labels(self, size: int | Shape) -> tuple[Tensor, list[str]]:
        """Returns the labels (n,) int64 of the images whose features `summary` returns, and the class names.

        The kind must be `images`. No image is read.
        """
        source = open_images(self.name, shape_of(size))
        return torch.from_numpy(source.labels[spaced_evenly(len(source), MAX_REAL_FEATURES)]), source.class_names

    def images(self, size: int | Shape, tokenizer: Tokenizer | None = None, num_workers: int = 0) -> ImageSet:
        """Opens the images.

        Args:
            size: side of the images in pixels, or their (height, width).
            tokenizer: tokenizer that encoded the token shards, on the device to decode on.
            num_workers: processes that decode image files.

        Raises:
            InputError: if they are damaged or of another size, or another tokenizer encoded them.
        """
        shape = shape_of(size)
        if self.kind == "shards":
            if tokenizer is None:
                raise InputError(f"{self.name} holds token shards: pass the tokenizer that encoded them as --tokenizer")
            images: ImageSet = DecodedShards(open_shards(self.name), tokenizer)
        elif self.kind == "npz":
            images = SourceImages(NpzSamples(Path(self.name)))
        else:
            source = open_images(
                self.name,
                shape,
                self.on_corrupt,
                crop=self.resizing.protocol,
                margin=self.resizing.margin,
            )
            images = SourceImages(source, num_workers)
        self.check_crop(images.crop)
        if images.shape != shape:
            raise InputError(
                f"the images of {self.name} are {format_shape(images.shape)}, but the images to score are "
                f"{format_shape(shape)}"
            )
        return images

    def summary(
        self,
        extractor: nn.Module,
        size: int | Shape,
        cache: Path,
        tokenizer: Tokenizer | None = None,
        num_workers: int = 0,
    ) -> Summary:
        """Returns statistics and features of the images; all ranks must call this.

        Each rank extracts features of its share; the result is cached. An npz with `mu` and `sigma`, such as the
        published ADM / OpenAI files or a file written by `evaluate --statistics`, is used as it is; it is valid only
        for the extractor that produced it. If it has images but no features, they are extracted from its images.

        Args:
            extractor: prepared, on the device to compute on.
            size: side of the images in pixels, or their (height, width).
            cache: folder for measured statistics.
            tokenizer: tokenizer that encoded the token shards, on the device to decode on.
            num_workers: processes that decode image files.

        Raises:
            InputError: if the images are damaged or of another size, or the statistics come from another extractor.
        """
        published, images = self.open(extractor, size, tokenizer, num_workers)
        if images is None:
            assert published is not None
            return published
        measured = measure_cached(extractor, images, self.name, cache)
        return measured if published is None else replace(published, features=measured.features)

    def open(
        self, extractor: nn.Module, size: int | Shape, tokenizer: Tokenizer | None = None, num_workers: int = 0
    ) -> tuple[Summary | None, ImageSet | None]:
        """Returns the statistics of an npz, and the images that `summary` measures; each is None if there are none.

        Arguments and errors are those of `summary`, but no image is read.
        """
        published = None
        if "mu" in self.arrays:
            published = Summary.load(Path(self.name), extractor)
            self.check_crop(published.crop)
            if published.features is not None or not self.has_images:
                return published, None
        return published, self.images(size, tokenizer, num_workers)

    def check_crop(self, crop: str) -> None:
        """Raises InputError if images or statistics are known to have been cropped by another protocol."""
        resizing = Resizing.parse(crop)
        if resizing is not None and resizing != self.resizing:
            raise InputError(
                f"the images of {self.name} were cropped by {crop}, not {self.resizing}: use {resizing.settings}"
            )


def open_reference(
    name: str,
    crop: CropProtocol = "var",
    margin: float = MARGIN,
    on_corrupt: OnCorrupt = "raise",
) -> Reference:
    """Parses the value of `--reference`.

    Args:
        name: `digits:test`, `photos:test` or another embedded set; `imagenet256` (64, 128, 512) for ADM's reference,
            downloaded on first use; a folder of class folders; local or remote archives; a local or remote npz of
            images (`arr_0`) or statistics (`mu`, `sigma`); a local or remote folder of token shards.
        crop, margin: how image files are resized and cropped; see `data.images.protocols`.
        on_corrupt: raise if an image file cannot be decoded, or skip it.

    Raises:
        InputError: if a file or folder does not exist or is unavailable, or an npz is damaged.
    """
    name, resizing = os.path.expanduser(name), Resizing(crop, margin)
    if (embedded := find_embedded_set(name)) is not None:
        return Reference(name, "images", embedded, resizing=resizing)
    path = Path(name)
    if name in ADM_REFERENCES and not path.exists():
        path = ADM_REFERENCES[name].path()
    elif is_remote(name):
        file = remote_file_name(split_off(name)[0])
        if "{}" in name or not file.endswith((*ARCHIVE_SUFFIXES, ".npz")):
            return Reference(name, "shards", resizing=resizing)
        if file.endswith(ARCHIVE_SUFFIXES):
            return Reference(name, "images", resizing=resizing, on_corrupt=on_corrupt)
        (path,) = fetch_files([name], Path(IMAGE_CACHE), RETRIES)
    if path.suffix == ".npz":
        return Reference(str(path), "npz", arrays=tuple(array_names(path)), resizing=resizing)
    if (path / MANIFEST).is_file():
        return Reference(name, "shards", resizing=resizing)
    if not os.path.exists(split_off(name)[0]) and not set(name) & set("{*?["):  # characters of archive patterns
        raise InputError(f"{name} does not exist")
    return Reference(name, "images", resizing=resizing, on_corrupt=on_corrupt)


def measure_cached(extractor: nn.Module, images: ImageSet, name: str, cache: Path) -> Summary:
    """Returns the summary of an image set from the folder `cache`; measures and caches it if it is missing."""
    content = f"{name} {images.identity} {images.shape} {images.crop}"
    identity = f"{content} {describe_extractor(extractor)} {fingerprint(extractor)}"
    path = cache / f"{type(extractor).__name__}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if object_from_rank_zero(path.is_file()):  # a file may appear between the checks of two ranks
        return Summary.load(path, extractor)
    summary = measure(extractor, images, f"features of {name}")
    if is_first_rank():
        summary.save(path, extractor)
    return summary


def measure(extractor: nn.Module, images: ImageSet, progress: str) -> Summary:
    """Returns the summary of an image set; each rank extracts features of its share.

    Raises:
        InputError: if there are fewer than 2 images.
    """
    if len(images) < 2:
        raise InputError(f"a covariance needs at least 2 images, got {len(images)}")
    features = Features(extractor, len(images), MAX_REAL_FEATURES)
    feed_shard(images, features, progress)
    summary = features.compute()
    on_cpu = None if summary.features is None else summary.features.cpu()
    return replace(summary, features=on_cpu, crop=images.crop)
