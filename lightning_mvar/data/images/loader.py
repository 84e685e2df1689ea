"""Shuffled image batches whose order depends only on (seed, epoch); loading can start at any batch of an epoch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch.utils.data import Dataset

from lightning_mvar.data.images.examples import Crop, Example, ImageBatch, ImageSource, batch_loader, generator_for
from lightning_mvar.data.resumable import ResumableLoader
from lightning_mvar.errors import InputError


class ShuffledImages(Dataset[Example]):
    """Images of one rank's batches; order and crops depend only on (seed, epoch, image).

    Args:
        images: the source.
        batch_size: images per rank.
        seed: seed of order and crops.
        crop: center crops, or random crops that change with each epoch.
        rank, world_size: select this process's part of each global batch.

    Raises:
        InputError: if there are fewer images than one global batch.
    """

    def __init__(self, images: ImageSource, batch_size: int, seed: int, crop: Crop, rank: int, world_size: int) -> None:
        self.images, self.seed, self.crop = images, seed, crop
        self.batch_size, self.rank, self.global_batch = batch_size, rank, batch_size * world_size
        self.epoch, self.first_batch = 0, 0
        if len(self) == 0:
            raise InputError(
                f"there are {len(images)} training images, fewer than one global batch of {self.global_batch}: "
                f"lower --data.batch_size or --data.global_batch_size"
            )

    def __len__(self) -> int:
        """Number of batches per epoch; the last, incomplete batch is dropped."""
        return len(self.images) // self.global_batch

    def batches(self) -> list[list[int]]:
        """Returns the indices of this rank's images for each batch from `first_batch` on."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.images)).tolist()
        starts = range(self.first_batch * self.global_batch, len(self) * self.global_batch, self.global_batch)
        offset = self.rank * self.batch_size
        return [order[start + offset : start + offset + self.batch_size] for start in starts]

    def __getitem__(self, index: int) -> Example:
        if self.crop == "center":
            return self.images[index]
        return self.images.random_crop(index, generator_for(self.seed, self.epoch, index))


class ImageLoader(ResumableLoader):
    """Resumable loader of `ImageBatch`es from `ShuffledImages`."""

    source: ShuffledImages

    def batches(self) -> Iterable[ImageBatch]:
        return batch_loader(self.source, self.source.batches(), self.num_workers, self.pin_memory)
