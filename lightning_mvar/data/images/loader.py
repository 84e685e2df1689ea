"""Batches of images in an order that depends on (seed, epoch) alone, from any batch of an epoch on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch.utils.data import DataLoader, Dataset

from lightning_mvar.data.images.examples import Crop, Example, ImageBatch, ImageSource, collate, generator_for
from lightning_mvar.data.resumable import ResumableLoader, leave_signals_to_the_main_process
from lightning_mvar.errors import InputError


class ShuffledImages(Dataset[Example]):
    """Images in the batches of one rank: shuffled, and cropped, by (seed, epoch, image) alone.

    Args:
        images: the source.
        batch_size: images per rank.
        seed: of order and crops.
        crop: of the images, at their centre or anew in every epoch.
        rank, world_size: which part of every global batch is this process's.

    Raises:
        InputError: if there are fewer images than a global batch has.
    """

    def __init__(self, images: ImageSource, batch_size: int, seed: int, crop: Crop, rank: int, world_size: int) -> None:
        self.images, self.seed, self.crop = images, seed, crop
        self.batch_size, self.rank, self.global_batch = batch_size, rank, batch_size * world_size
        self.epoch, self.first_batch = 0, 0
        if len(self) == 0:
            raise InputError(
                f"there are {len(images)} training images, fewer than one global batch of {self.global_batch}: "
                f"lower --data.batch_size"
            )

    def __len__(self) -> int:
        """Batches; images that do not fill the last one are left out."""
        return len(self.images) // self.global_batch

    def batches(self) -> list[list[int]]:
        """Numbers of this rank's images, batch by batch, from `first_batch` on."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.images)).tolist()
        begins = range(self.first_batch * self.global_batch, len(self) * self.global_batch, self.global_batch)
        mine = self.rank * self.batch_size
        return [order[begin + mine : begin + mine + self.batch_size] for begin in begins]

    def __getitem__(self, number: int) -> Example:
        if self.crop == "center":
            return self.images[number]
        return self.images.cropped(number, generator_for(self.seed, self.epoch, number))


class ImageLoader(ResumableLoader):
    """Batches of images (`ImageBatch`) from `ShuffledImages`."""

    source: ShuffledImages

    def batches(self) -> Iterable[ImageBatch]:
        return DataLoader(
            self.source,
            batch_sampler=self.source.batches(),
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            worker_init_fn=leave_signals_to_the_main_process,
        )
