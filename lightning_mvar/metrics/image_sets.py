"""Images to be scored, or to be scored against, batch by batch, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mvar.data.images.examples import Images, image_loader
from lightning_mvar.data.images.sources import ARCHIVES, open_images
from lightning_mvar.data.tokens.shards import MANIFEST, read_shard
from lightning_mvar.data.tokens.sources import ShardSource, open_shards
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import is_remote, name_in
from lightning_mvar.io.npz import names_in
from lightning_mvar.sampling.readers import NpzSamples
from lightning_mvar.scales import Shape, in_words, shape_of
from lightning_mvar.tokenizer.tokenizer import Tokenizer

BATCH_SIZE = 64


class ImageSet(Protocol):
    """Images by number; `identity` changes when they do."""

    shape: Shape

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, begin: int, end: int) -> Iterator[Tensor]:
        """The images from `begin` to `end` in order: (b, 3, H, W) float32 in [0, 1], b at most `BATCH_SIZE`."""
        ...


class Pictures:
    """The images of a source, read in `num_workers` processes, or in this one where there are none."""

    def __init__(self, source: Images, num_workers: int = 0) -> None:
        self.source, self.num_workers = source, num_workers
        self.shape = source.shape

    @property
    def identity(self) -> str:
        return self.source.identity

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, begin: int, end: int) -> Iterator[Tensor]:
        for batch in image_loader(self.source, BATCH_SIZE, self.num_workers, range(begin, end)):
            yield (batch.images + 1) / 2


class DecodedShards:
    """What the tokens of a folder of shards decode to: the best that a network trained on them can draw.

    Args:
        shards: where they are.
        tokenizer: that made them, on the device to decode on.

    Raises:
        InputError: if it is another tokenizer, or a shard is missing or damaged.
    """

    def __init__(self, shards: ShardSource, tokenizer: Tokenizer) -> None:
        self.shards, self.tokenizer, self.manifest = shards, tokenizer, shards.manifest()
        if self.manifest.tokenizer != (ours := tokenizer.fingerprint()):
            raise InputError(
                f"the shards in {shards} are of tokenizer {self.manifest.tokenizer}, not of {ours}: name theirs with "
                f"--tokenizer"
            )
        self.shape = tokenizer.config.shape

    @property
    def identity(self) -> str:
        return " ".join([self.manifest.tokenizer, *(shard.sha256 for shard in self.manifest.shards)])

    def __len__(self) -> int:
        return self.manifest.num_samples

    @torch.no_grad()
    def batches(self, begin: int, end: int) -> Iterator[Tensor]:
        device = self.tokenizer.quantizer.codebook.weight.device
        for tokens in self.tokens(begin, end):
            yield (self.tokenizer.decode(tokens.to(device)) + 1) / 2

    def tokens(self, begin: int, end: int) -> Iterator[Tensor]:
        """(b, l) int64 of the samples from `begin` to `end`."""
        for shard, first in zip(self.manifest.shards, self.manifest.offsets, strict=True):
            if first >= end or first + shard.samples <= begin:
                continue
            for pack in read_shard(self.shards.fetch(shard)):
                mine = pack.tokens[max(begin - first, 0) : max(end - first, 0)]
                first += len(pack.tokens)
                for part in torch.from_numpy(mine.astype("int64")).split(BATCH_SIZE):
                    if len(part):
                        yield part


class Reconstructions:
    """What a tokenizer, on the device to compute on, makes of images."""

    def __init__(self, images: ImageSet, tokenizer: Tokenizer) -> None:
        self.images, self.tokenizer = images, tokenizer
        self.shape = images.shape

    @property
    def identity(self) -> str:
        return f"{self.images.identity} {self.tokenizer.fingerprint()}"

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def batches(self, begin: int, end: int) -> Iterator[Tensor]:
        device = self.tokenizer.quantizer.codebook.weight.device
        for images in self.images.batches(begin, end):
            yield (self.tokenizer.decode(self.tokenizer.encode(images.to(device) * 2 - 1)) + 1) / 2


def open_image_set(
    source: str, size: int | Shape, tokenizer: Tokenizer | None = None, num_workers: int = 0
) -> ImageSet:
    """Real images for comparison.

    Args:
        source: `digits:train`, `photos:test` and the like; a folder of class folders, whose images are resized and
            cropped at the centre; archives; an npz of images (`arr_0`); or token shards, here or elsewhere, which
            `tokenizer` decodes.
        size: side of the images in pixels, or their (height, width).
        tokenizer: on the device to decode on.
        num_workers: processes that read image files.

    Raises:
        InputError: if there is no such source, its images are of another size, or it is of another tokenizer.
    """
    path, shape = Path(source), shape_of(size)
    if holds_shards(source):
        if tokenizer is None:
            raise InputError(f"{source} holds token shards: name the tokenizer that decodes them with --tokenizer")
        found: ImageSet = DecodedShards(open_shards(source), tokenizer)
    elif path.suffix == ".npz":
        found = Pictures(NpzSamples(path))
    else:
        found = Pictures(open_images(source, shape), num_workers)
    if found.shape != shape:
        raise InputError(f"the images of {source} are {in_words(found.shape)}, those to be scored {in_words(shape)}")
    return found


def holds_shards(source: str) -> bool:
    """Whether a source is a folder of token shards; one elsewhere is, if it is not archives."""
    if is_remote(source):
        return PurePosixPath(name_in(source)).suffix not in ARCHIVES
    return (Path(source) / MANIFEST).is_file()


def has_images(path: Path) -> bool:
    """Whether an npz has images, not their statistics alone."""
    return "arr_0" in names_in(path)


def share(count: int) -> tuple[int, int]:
    """The part of `count` images that is this rank's: first, and first no more."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return count * rank // ranks, count * (rank + 1) // ranks
