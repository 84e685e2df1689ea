"""Lightning datamodules: token shards for the network, images for the tokenizer."""

from __future__ import annotations

from typing import TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_mvar.data.images.examples import Crop, Example, ImageBatch, ImageSource, OnCorrupt, collate
from lightning_mvar.data.images.loader import ImageLoader, ShuffledImages
from lightning_mvar.data.images.sources import IMAGE_CACHE, open_images
from lightning_mvar.data.resumable import ResumableLoader, leave_signals_to_the_main_process
from lightning_mvar.data.tokens.shards import Manifest, chosen_samples
from lightning_mvar.data.tokens.sources import SHARD_CACHE, open_shards
from lightning_mvar.data.tokens.stream import TokenBatch, TokenLoader, TokenStream
from lightning_mvar.errors import InputError
from lightning_mvar.scales import Shape, shape_of

Loader = TypeVar("Loader", bound=ResumableLoader)


class TokenDataModule(L.LightningDataModule):
    """Streams tokenized images from the shards that `lightning-mvar tokenize` wrote.

    Args:
        train: folder of the training shards: on this machine, `https://HOST/PATH`, or a command that prints the file
            whose name is put for {}, such as `pipe:aws s3 cp s3://BUCKET/PATH/{} -`.
        val: the same of the validation shards.
        test: the same of the test shards; the validation shards where not given.
        batch_size: images per rank and step.
        num_workers: processes that read ahead; 0 reads in the training process, which suffices for local files.
        block_size: samples that are shuffled together, in memory at once.
        seed: of the shuffling, together with the epoch.
        cache_dir: folder on this machine that keeps shards from elsewhere; nothing is ever removed from it.
        retries: attempts to read a file from elsewhere, after one that failed: 1, 2, 4, ... seconds later.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        block_size: int = 16_384,
        seed: int = 0,
        cache_dir: str = SHARD_CACHE,
        retries: int = 5,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("block_size", block_size, 1),
            ("num_workers", num_workers, 0),
            ("retries", retries, 0),
        ):
            if value < least:
                raise InputError(f"data.{name} is too small, got {value}")
        places = {"train": train, "val": val, "test": test or val}
        self.shards = {name: open_shards(place, cache_dir, retries) for name, place in places.items()}
        self.batch_size, self.num_workers, self.block_size, self.seed = batch_size, num_workers, block_size, seed
        self.manifests: dict[str, Manifest] = {}

    def setup(self, stage: str) -> None:
        """Reads the manifests that `stage` needs.

        Raises:
            InputError: if shards are missing, unfinished or damaged, or have other classes than those before.
        """
        needed = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]
        for name in needed:
            self.manifests[name] = self.shards[name].manifest()
        names = {name: manifest.class_names for name, manifest in self.manifests.items()}
        if any(classes != next(iter(names.values())) for classes in names.values()):
            raise InputError(f"the shards in {' and '.join(str(self.shards[n]) for n in names)} have other classes")

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order; available after `setup`."""
        return next(iter(self.manifests.values())).class_names

    def keys(self, batch: TokenBatch) -> list[str]:
        """Names of the images of a training batch."""
        return chosen_samples(self.manifests["train"], self.shards["train"].fetch, batch.ids.tolist()).keys

    def train_dataloader(self) -> TokenLoader:
        return following(self.loader("train", self.seed), self.trainer)

    def val_dataloader(self) -> TokenLoader:
        return self.loader("val", None)

    def test_dataloader(self) -> TokenLoader:
        return self.loader("test", None)

    def loader(self, name: str, seed: int | None) -> TokenLoader:
        rank, world_size = place(self.trainer)
        stream = TokenStream(
            self.shards[name], self.manifests[name], self.batch_size, seed, self.block_size, rank, world_size
        )
        return TokenLoader(stream, self.num_workers, pin_memory=torch.cuda.is_available())


class ImageDataModule(L.LightningDataModule):
    """Images for training a tokenizer.

    Args:
        train: `digits:train`, `photos64:train` and the like, a folder of class folders, or archives as `tokenize` takes
            them. (Not Parquet where there are many images: each is in a row group that is read as a whole.)
        val: the same.
        resolution: side of the images in pixels, or [height, width].
        batch_size: images per rank and step.
        num_workers: processes that decode images; 0 decodes in the training process.
        crop: of the training images, anew in every epoch; validation images are cropped at their centre.
        on_corrupt: raise on an image that cannot be decoded, or skip it (each is named in a warning).
        seed: of the shuffling and the crops, together with the epoch.
        cache_dir: folder on this machine that keeps archives from elsewhere; nothing is ever removed from it.
        retries: attempts to read an archive from elsewhere, after one that failed: 1, 2, 4, ... seconds later.
    """

    def __init__(
        self,
        train: str,
        val: str,
        resolution: int | Shape = 256,
        batch_size: int = 64,
        num_workers: int = 0,
        crop: Crop = "random",
        on_corrupt: OnCorrupt = "raise",
        seed: int = 0,
        cache_dir: str = IMAGE_CACHE,
        retries: int = 5,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("retries", retries, 0),
        ):
            if value < least:
                raise InputError(f"data.{name} is too small, got {value}")
        self.sources = {"train": train, "val": val}
        self.shape, self.crop, self.on_corrupt = shape_of(resolution), crop, on_corrupt
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.cache_dir, self.retries = cache_dir, retries

    def images(self, name: str) -> ImageSource:
        return open_images(
            self.sources[name], self.shape, self.on_corrupt, cache_dir=self.cache_dir, retries=self.retries
        )

    def keys(self, batch: ImageBatch) -> list[str]:
        """Names of the images of a batch."""
        return batch.keys

    def train_dataloader(self) -> ImageLoader:
        source = ShuffledImages(self.images("train"), self.batch_size, self.seed, self.crop, *place(self.trainer))
        loader = ImageLoader(source, self.num_workers, pin_memory=torch.cuda.is_available())
        return following(loader, self.trainer)

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        return DataLoader[Example](  # type: ignore[return-value]
            self.images("val"),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_the_main_process,
        )


def place(trainer: L.Trainer | None) -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def following(loader: Loader, trainer: L.Trainer | None) -> Loader:
    """Let a training loader know where Lightning is: the epoch, and which batches were part of complete steps."""
    if trainer is not None:
        progress = trainer.fit_loop.epoch_loop.batch_progress

        def trained() -> int:
            done: int = progress.current.processed  # type: ignore[attr-defined]
            return done if done >= loader.limit() else done - done % trainer.accumulate_grad_batches

        loader.trained = trained
        loader.limit = lambda: min(len(loader), int(trainer.num_training_batches))
        loader.epoch = trainer.current_epoch - 1  # the next pass is this epoch's; a restored place comes on top
    return loader
