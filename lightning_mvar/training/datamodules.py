"""Lightning datamodules: token shards for the network, images for the tokenizer."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_mvar.data.images.examples import Crop, Example, ImageBatch, ImageSource, OnCorrupt, collate
from lightning_mvar.data.images.loader import ImageLoader, ShuffledImages
from lightning_mvar.data.images.protocols import MARGIN
from lightning_mvar.data.images.sources import IMAGE_CACHE, open_images
from lightning_mvar.data.resumable import ResumableLoader, worker_options
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.shards import read_samples
from lightning_mvar.data.tokens.sources import SHARD_CACHE, open_shards
from lightning_mvar.data.tokens.stream import PairedStream, TokenBatch, TokenLoader, TokenStream
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.fetch import RETRIES
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.scales import Shape, shape_of
from lightning_mvar.training.agreement import read_on_all_ranks

Loader = TypeVar("Loader", bound=ResumableLoader)


class BatchedDataModule(L.LightningDataModule):
    """Datamodule that divides a global batch equally among the devices, which share one seed.

    The number of images per optimizer step, and so the learning rate, is the same on any number of devices, unless
    `batch_size` sets the images per device.

    Args:
        global_batch_size: images per optimizer step over all devices.
        batch_size: images per device and batch, instead of `global_batch_size`.
        max_batch_size: maximum images per device and batch; gradients are accumulated to reach `global_batch_size`.
        num_workers: number of processes that read and decode ahead; 0 reads in the training process, which suffices
            for local shards.
        seed: seed of shuffling and crops, combined with the epoch; default: `seed_everything`.
        retries: number of retries if a remote file cannot be read, 1, 2, 4, ... seconds apart.

    Raises:
        InputError: if an argument is too small.
    """

    def __init__(
        self,
        global_batch_size: int = 64,
        batch_size: int | None = None,
        max_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        retries: int = RETRIES,
    ) -> None:
        super().__init__()
        sizes = {"global_batch_size": global_batch_size, "batch_size": batch_size, "max_batch_size": max_batch_size}
        require_in("[1, inf)", "data.", **sizes)
        require_in("[0, inf)", "data.", num_workers=num_workers, retries=retries)
        self.global_batch_size, self.given_batch_size, self.max_batch_size = (
            global_batch_size,
            batch_size,
            max_batch_size,
        )
        self.num_workers, self.retries = num_workers, retries
        self.seed = torch.initial_seed() if seed is None else seed

    def setup(self, stage: str) -> None:
        if self.trainer is None:
            return
        self.seed = self.trainer.strategy.broadcast(self.seed)
        if stage == "fit" and self.given_batch_size is None:
            before, interval = self.trainer.accumulate_grad_batches, self.trainer.val_check_interval
            after = self.trainer.accumulate_grad_batches = self.accumulation(before)
            if isinstance(interval, int):  # counted in batches, of which a step now takes more
                self.trainer.val_check_interval = interval * after // before

    @property
    def pin_memory(self) -> bool:
        """Whether to pin batches, only for a trainer on GPUs because pinning initializes CUDA."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    @property
    def batch_size(self) -> int:
        """Images per device and batch."""
        if self.given_batch_size is not None:
            return self.given_batch_size
        accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        share = self.global_batch_size // (trainer_ranks(self.trainer)[1] * accumulated)
        return max(1, min(share, self.max_batch_size or share))  # outside `fit`, the share may be rounded

    def accumulation(self, at_least: int) -> int:
        """Returns the smallest number of batches per step, `at_least` or more, that divides the global batch and fits.

        Raises:
            InputError: if the global batch cannot be divided over the devices.
        """
        devices = trainer_ranks(self.trainer)[1]
        per_device, rest = divmod(self.global_batch_size, devices)
        for batches in range(at_least, per_device + 1):
            if rest == 0 and per_device % batches == 0 and per_device // batches <= (self.max_batch_size or per_device):
                return batches
        raise InputError(
            f"data.global_batch_size {self.global_batch_size} cannot be divided among {devices} devices in {at_least} "
            f"or more equal batches: choose a multiple, or set the images per device with data.batch_size"
        )


class TokenDataModule(BatchedDataModule):
    """Datamodule that streams tokens from shards written by `lightning-mvar tokenize` or `sample --tokens`.

    Args:
        train: folder of the training shards: a local path; `https://HOST/PATH`, `s3://BUCKET/PATH`, `gs://BUCKET/PATH`
            or `hf://datasets/USER/NAME`; or a command that prints the file named by {}, such as
            `pipe:rclone cat REMOTE:PATH/{}`.
        val: folder of the validation shards, like `train`.
        test: folder of the test shards, like `train`; default: the validation shards.
        own: folder of shards with the network's own samples, like `train`, for objectives that compare them with real
            images: half of each training batch comes from it.
        block_size: number of samples that are shuffled together.
        cache_dir: local folder that caches remote shards; nothing is ever removed from it.
        batching: options of `BatchedDataModule`.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: str | None = None,
        block_size: int = 16_384,
        cache_dir: str = SHARD_CACHE,
        own: str | None = None,
        **batching: Any,
    ) -> None:
        super().__init__(**batching)
        require_in("[1, inf)", "data.", block_size=block_size)
        sources = {"train": train, "val": val, "test": test or val} | ({} if own is None else {"own": own})
        self.shards = {name: open_shards(source, cache_dir, self.retries) for name, source in sources.items()}
        self.block_size = block_size
        self.manifests: dict[str, Manifest] = {}
        self.verified: set[str] = set()  # sets whose local shards have the right checksums

    def setup(self, stage: str) -> None:
        """Reads the manifests that `stage` needs and verifies the shards; each process on a machine verifies a part.

        Raises:
            InputError: on all ranks, if shards are missing, unfinished or damaged, differ between ranks, or if training
                and validation shards differ in classes or margin.
        """
        super().setup(stage)
        trained_on = [name for name in ("train", "own") if name in self.shards]
        needed = {"fit": [*trained_on, "val"], "validate": ["val"], "test": ["test"], "predict": ["test"]}[stage]

        def read() -> tuple[dict[str, Manifest], dict[str, str]]:
            manifests = {name: self.shards[name].manifest() for name in needed}
            return manifests, {f"data.{name}": manifest.digest for name, manifest in manifests.items()}

        def verify() -> tuple[set[str], dict[str, str]]:
            for name in set(needed) - self.verified:
                self.shards[name].verify(self.manifests[name].shards[part])
            return set(needed), {}

        part = slice(None) if self.trainer is None else slice(self.trainer.local_rank, None, self.trainer.num_devices)
        self.manifests |= read_on_all_ranks(read)
        self.verified |= read_on_all_ranks(verify)
        names = {name: manifest.class_names for name, manifest in self.manifests.items()}
        if any(classes != next(iter(names.values())) for classes in names.values()):
            raise InputError(f"the shards in {' and '.join(str(self.shards[n]) for n in names)} have different classes")
        margins = {str(self.shards[n]): m.margin for n, m in self.manifests.items() if m.sampling is None}
        if len(set(margins.values())) > 1:
            described = " and ".join(f"{margin} in {location}" for location, margin in margins.items())
            raise InputError(
                f"the images of the shards have different margins, {described}: tokenize all with the same --margin"
            )

    def check_network(self, network: MVARConfig, tokenizer: str) -> None:
        """Raises InputError that names the field unless all shards fit a network and this tokenizer fingerprint."""
        fields = network.schedule.side_lengths, network.vocab_size, network.num_classes, tokenizer
        for name, manifest in self.manifests.items():
            manifest.check_model(self.shards[name], *fields)

    def check_classes(self, class_names: list[str]) -> None:
        """Raises InputError that names the class unless all shards have these classes; no names fit any classes."""
        for name, manifest in self.manifests.items() if class_names else ():
            manifest.check_classes(self.shards[name], class_names)

    @property
    def class_names(self) -> list[str]:
        """Class names in label order; available after `setup`."""
        return next(iter(self.manifests.values())).class_names

    @property
    def margin(self) -> float:
        """Margin of the crops; available after `setup`."""
        return next(iter(self.manifests.values())).margin

    def keys(self, batch: TokenBatch) -> list[str]:
        """Returns the names of the images in a training batch."""
        halves = (
            {"train": batch.ids} if batch.own is None else dict(zip(("train", "own"), batch.ids.chunk(2), strict=True))
        )
        samples = [read_samples(self.manifests[n], self.shards[n].fetch, ids.tolist()) for n, ids in halves.items()]
        return [key for part in samples for key in part.keys]

    def train_dataloader(self) -> TokenLoader:
        return track_progress(self.loader("train", self.seed), self.trainer)

    def val_dataloader(self) -> TokenLoader:
        return self.loader("val", None)

    def test_dataloader(self) -> TokenLoader:
        return self.loader("test", None)

    def predict_dataloader(self) -> TokenLoader:
        """Returns the test shards, whose labels are used for prediction."""
        return self.test_dataloader()

    def loader(self, name: str, seed: int | None) -> TokenLoader:
        source: TokenStream | PairedStream
        if name == "train" and "own" in self.shards:
            half, odd = divmod(self.batch_size, 2)
            if odd:
                raise InputError(
                    f"{self.batch_size} images per device cannot be half real and half from data.own: choose an even "
                    f"--data.batch_size or another --data.global_batch_size"
                )
            source = PairedStream(self.stream(name, seed, half), self.stream("own", self.seed + 1, half))
        else:
            source = self.stream(name, seed, self.batch_size)
        return TokenLoader(source, self.num_workers, self.pin_memory)

    def stream(self, name: str, seed: int | None, batch_size: int) -> TokenStream:
        rank, world_size = trainer_ranks(self.trainer)
        return TokenStream(
            self.shards[name],
            self.manifests[name],
            batch_size,
            seed,
            self.block_size,
            rank,
            world_size,
            verified=name in self.verified,
        )


class ImageDataModule(BatchedDataModule):
    """Datamodule of images for training a tokenizer.

    Args:
        train: training images: an embedded set such as `digits:train` or `photos64:train`, a folder of images or of
            class folders, or archives as in `tokenize`. Avoid Parquet for many images: each access reads a complete
            row group.
        val: validation images, like `train`.
        resolution: side of the images in pixels, or [height, width].
        crop: crop of training images, drawn anew in each epoch if random; validation images are center-cropped.
        margin: images are resized to cover this many times the resolution before they are cropped; with 1, square
            images are not cropped.
        on_corrupt: `raise` an error if an image cannot be decoded, or `skip` it with a warning.
        cache_dir: local folder that caches remote archives; nothing is ever removed from it.
        batching: options of `BatchedDataModule`.
    """

    def __init__(
        self,
        train: str,
        val: str,
        resolution: int | Shape = 256,
        crop: Crop = "random",
        on_corrupt: OnCorrupt = "raise",
        cache_dir: str = IMAGE_CACHE,
        margin: float = MARGIN,
        **batching: Any,
    ) -> None:
        super().__init__(**batching)
        self.sources = {"train": train, "val": val}
        self.shape, self.crop, self.on_corrupt = shape_of(resolution), crop, on_corrupt
        self.cache_dir, self.margin = cache_dir, margin

    def images(self, name: str) -> ImageSource:
        """Opens one of the sets; raises InputError if ranks have different images."""

        def read() -> tuple[ImageSource, dict[str, str]]:
            images = open_images(
                self.sources[name],
                self.shape,
                self.on_corrupt,
                cache_dir=self.cache_dir,
                retries=self.retries,
                margin=self.margin,
            )
            return images, {f"data.{name}": images.listing}

        return read_on_all_ranks(read)

    def keys(self, batch: ImageBatch) -> list[str]:
        """Returns the names of the images in a batch."""
        return batch.keys

    def train_dataloader(self) -> ImageLoader:
        source = ShuffledImages(
            self.images("train"), self.batch_size, self.seed, self.crop, *trainer_ranks(self.trainer)
        )
        return track_progress(ImageLoader(source, self.num_workers, self.pin_memory), self.trainer)

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        return DataLoader[Example](  # type: ignore[return-value]
            self.images("val"),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            **worker_options(self.num_workers),
        )


def trainer_ranks(trainer: L.Trainer | None) -> tuple[int, int]:
    """Returns the rank of this process and the world size; (0, 1) without a trainer."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def track_progress(loader: Loader, trainer: L.Trainer | None) -> Loader:
    """Makes a training loader follow Lightning's epoch and count the batches of completed optimizer steps."""
    if trainer is not None:
        progress = trainer.fit_loop.epoch_loop.batch_progress

        def trained() -> int:
            done: int = progress.current.processed  # type: ignore[attr-defined]
            return done if done >= loader.batches_per_epoch() else done - done % trainer.accumulate_grad_batches

        loader.batches_trained = trained
        loader.batches_per_epoch = lambda: min(len(loader), int(trainer.num_training_batches))
        loader.repeats_epoch = trainer.overfit_batches > 0  # type: ignore[attr-defined]
        loader.epoch = trainer.current_epoch - 1  # the next pass increments it; a restored position is set later
    return loader
