"""Sets of generated or real images, read batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_mvar.data.images.examples import ImageSource, decoded_batches
from lightning_mvar.data.images.protocols import Resizing
from lightning_mvar.data.tokens.shards import read_shard
from lightning_mvar.data.tokens.sources import ShardSource
from lightning_mvar.devices import rank_and_world_size
from lightning_mvar.sampling.readers import Samples
from lightning_mvar.scales import Shape
from lightning_mvar.tokenizer.tokenizer import Tokenizer

BATCH_SIZE = 64


class ImageSet(ABC):
    """Indexed images, read batch by batch; `identity` changes if the images change.

    `crop` is the crop protocol of real images, `none` or `unknown`.
    """

    shape: Shape
    crop: str

    @property
    @abstractmethod
    def identity(self) -> str: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, begin: int, end: int) -> Iterator[Tensor]:
        """Yields the images from `begin` to `end` in order: (b, 3, H, W) float32 in [0, 1], b at most `BATCH_SIZE`.

        Images that cannot be decoded are left out, if the set allows it.
        """


class SourceImages(ImageSet):
    """Images of a source or of sample files, decoded by `num_workers` processes; 0 decodes in this one."""

    def __init__(self, source: ImageSource | Samples, num_workers: int = 0) -> None:
        self.source, self.num_workers = source, num_workers
        self.shape, self.crop = source.shape, source.crop

    @property
    def identity(self) -> str:
        return self.source.identity

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, begin: int, end: int) -> Iterator[Tensor]:
        for batch in decoded_batches(self.source, BATCH_SIZE, self.num_workers, range(begin, end)):
            yield (batch.images + 1) / 2


class DecodedShards(ImageSet):
    """Images decoded from token shards: the best possible samples of a network trained on them.

    Args:
        shards: token shards.
        tokenizer: the tokenizer that encoded them, on the device to decode on.

    Raises:
        InputError: if another tokenizer encoded them, or a shard is missing or damaged.
    """

    def __init__(self, shards: ShardSource, tokenizer: Tokenizer) -> None:
        self.shards, self.tokenizer, self.manifest = shards, tokenizer, shards.manifest()
        self.manifest.check_tokenizer(shards, tokenizer.fingerprint())
        self.shape, self.crop = tokenizer.config.shape, str(Resizing("var", self.manifest.margin))

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
        """Yields the tokens (b, l) int64 of samples `begin` to `end`."""
        for shard, first in zip(self.manifest.shards, self.manifest.offsets, strict=True):
            if first >= end or first + shard.samples <= begin:
                continue
            for pack in read_shard(self.shards.fetch(shard), shard, self.manifest.spec):
                selected = pack.tokens[max(begin - first, 0) : max(end - first, 0)]
                first += len(pack.tokens)
                for batch in torch.from_numpy(selected.astype("int64")).split(BATCH_SIZE):
                    if len(batch):
                        yield batch


class Reconstructions(ImageSet):
    """Images encoded and decoded by a tokenizer, on its device."""

    def __init__(self, images: ImageSet, tokenizer: Tokenizer) -> None:
        self.images, self.tokenizer = images, tokenizer
        self.shape, self.crop = images.shape, images.crop

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


def shard_range(count: int) -> tuple[int, int]:
    """Returns this rank's range [begin, end) of `count` images."""
    rank, world_size = rank_and_world_size()
    return count * rank // world_size, count * (rank + 1) // world_size
