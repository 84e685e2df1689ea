"""`tokenize`: encodes images into token shards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli.arguments import refuse_overwriting
from lightning_mvar.data.images.examples import ImageSource, Views, batch_loader, batched
from lightning_mvar.data.images.protocols import MARGIN
from lightning_mvar.data.images.sources import IMAGE_CACHE, find_embedded_set, open_images, refuse_split, split_off
from lightning_mvar.data.tokens.encode import EncodedBatch, TokenEncoder
from lightning_mvar.data.tokens.manifest import Manifest, read_record, record_paths
from lightning_mvar.data.tokens.verify import counted
from lightning_mvar.data.tokens.writing import ShardFolder
from lightning_mvar.devices import Precision
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.fetch import RETRIES
from lightning_mvar.io.locks import lock_folder

if TYPE_CHECKING:
    from lightning.fabric import Fabric

ORDER_SEED = 0  # images go into the shards in a fixed random order, so that every shard has all classes


def tokenize(
    images: str,
    tokenizer: str,
    out: str,
    labels: str | None = None,
    class_names: str | None = None,
    split: bool = False,
    margin: float = MARGIN,
    views: int = 1,
    flips: bool = False,
    seed: int = 0,
    shard_size: int = 10_000,
    batch_size: int = 64,
    num_workers: int = 0,
    max_failures: int = 0,
    cache_dir: str = IMAGE_CACHE,
    retries: int = RETRIES,
    precision: Precision = "float32",
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> None:
    """Encodes images into token shards. After an interruption, run it again, on any number of devices, to continue.

    Args:
        images: a folder of class folders (CLASS/NAME.png|jpg|webp|...), or of pictures of one class; ImageNet's tar of
            tars, a tar of class folders, or one tar per class; WebDataset shards with .cls or .json, as a folder or a
            pattern (train-{0000..0146}.tar); Parquet or Arrow files with image and label; or an embedded set such as
            `digits:train` or `photos:test`. Tars may be compressed (.tar.gz, .tar.zst). Archives may be remote:
            https://HOST/train-{0000..0146}.tar, s3://BUCKET/train-{0000..0146}.tar (also gs:// and hf://), or a command
            that prints an archive, such as `pipe:rclone cat REMOTE:train-{0000..0146}.tar`.
        tokenizer: folder that `train-tokenizer` or `export` wrote, published file, or vae-ch160v4096z32.
        out: folder for the shards and their manifest.
        labels: for images without classes, such as ILSVRC2012_img_val.tar: a file with lines `NAME CLASS`, or only
            CLASS in the order of the names, or ILSVRC2012_devkit_t12.tar.gz. For tables and shards with several labels
            or images: the columns to use, as LABEL or IMAGE,LABEL.
        class_names: `imagenet`, or a file with one name per line, in label order: the names of numeric classes, or the
            names that class folders may have.
        split: hold out a tenth of the images, chosen by class and name, for validation: IMAGES:train goes to OUT/train,
            and IMAGES:val, with one center crop per image, to OUT/val.
        margin: images are resized to cover this many times the tokenizer's input, then cropped; 1 keeps square images
            whole.
        views: samples per image: 1 is the center crop, more are random crops.
        flips: mirror half of the random crops.
        seed: seed of the random crops.
        shard_size: samples per shard.
        batch_size: images per batch.
        num_workers: image-decoding processes per device; 0 decodes in the encoding process.
        max_failures: number of undecodable images to tolerate; they are skipped, reported and listed in the manifest.
        cache_dir: folder on this machine for downloaded and decompressed archives; nothing is ever removed from it.
        retries: further attempts to read a remote archive after a failure, 1, 2, 4, ... seconds apart.
        precision: precision of the encoder; codes are always chosen in float32.
        device: auto, cpu, cuda or cuda:N.
        devices: processes per machine, each with its own GPU if `device` is cuda.
        num_nodes: number of machines; start the same command on each, with torchrun or Slurm.
    """
    require_in("[1, inf)", "--", views=views, shard_size=shard_size, batch_size=batch_size)
    require_in("[0, inf)", "--", num_workers=num_workers, max_failures=max_failures, retries=retries)
    refuse_overwriting({"--out": out}, {"--tokenizer": tokenizer, "--labels": labels, "--class_names": class_names})
    if flips and views == 1:
        raise InputError("--flips applies to random crops: set --views to 2 or more")
    folder = Path(out)
    if folder.is_file():
        raise InputError(f"--out {folder} is a file; name a folder")
    refuse_overlap(images, out)
    parts = destinations(images, folder, split, views)
    from lightning_mvar.cli.ranks import launch_ranks  # imports Lightning, which takes seconds

    with launch_ranks(device, devices, num_nodes) as fabric, ExitStack() as stack:
        model = load_tokenizer(tokenizer)
        sources = [
            open_images(name, model.config.shape, "skip", labels, class_names, cache_dir, retries, margin=margin)
            for name, _, _ in parts
        ]
        folders = []
        for source, (name, target, crops) in zip(sources, parts, strict=True):
            order = shard_order(source, crops)
            plan = Manifest(  # still without shards
                side_lengths=list(model.config.schedule.side_lengths),
                vocab_size=model.config.vocab_size,
                class_names=source.class_names,
                tokenizer=model.fingerprint(),
                source=name,
                num_images=len(source),
                shard_size=shard_size,
                order=sha256(order.tobytes()).hexdigest(),
                listing=source.listing,
                views=crops,
                margin=margin,
                precision=precision,
                seed=seed if crops > 1 else 0,
                flips=flips and crops > 1,
            )
            if fabric.is_global_zero:
                stack.enter_context(lock_folder(target, "tokenize"))
            fabric.barrier()
            folders.append((source, order, ShardFolder(target, plan, "--out")))
        for source, order, shards in folders:
            writer = ShardWriter(fabric, shards, TokenEncoder(model, fabric.device, precision), max_failures)
            writer.run(source, order, batch_size, num_workers)
            manifest = shards.finish()
            if fabric.is_global_zero:
                report(manifest, shards.folder, writer.images_per_s)


def destinations(images: str, out: Path, split: bool, views: int) -> list[tuple[str, Path, int]]:
    """Returns the sources to encode, each with the folder of its shards and the number of samples per image.

    Raises:
        InputError: if `split` is requested, but `images` names one split already.
    """
    if not split:
        return [(images, out, views)]
    if find_embedded_set(images) is not None:
        raise InputError(f"--images {images} is one split of a built-in set: leave out --split")
    refuse_split(images)
    return [(f"{images}:train", out / "train", views), (f"{images}:val", out / "val", 1)]


def refuse_overlap(images: str, out: str) -> None:
    """Raises InputError if one folder contains the other, because shards would mix with images."""
    folder, _ = split_off(images)
    if os.path.isdir(folder):
        paths = [os.path.realpath(folder), os.path.realpath(out)]
        if os.path.commonpath(paths) in paths:
            raise InputError(
                f"one of --out {out} and --images {images} contains the other: choose an --out outside of the images"
            )


def report(manifest: Manifest, folder: Path, images_per_s: float | None) -> None:
    """Prints a summary; raises InputError if there are no samples."""
    skipped = f", {counted(len(manifest.skipped), 'image')} skipped" if manifest.skipped else ""
    rate = "" if images_per_s is None else f"; {images_per_s:.1f} images/s per device"
    counts = f"{counted(manifest.num_samples, 'sample')} in {counted(len(manifest.shards), 'shard')}"
    print(f"{counts} in {folder}{skipped}{rate}")
    if not manifest.num_samples:
        raise InputError(f"no image of {manifest.source} could be decoded; the manifest in {folder} lists the errors")


class ShardWriter:
    """Encodes and writes one rank's shards.

    Args:
        fabric: states rank and world size.
        shards: folder of the shards.
        encode: encodes batches of images into tokens.
        max_failures: see `tokenize`.
    """

    def __init__(self, fabric: Fabric, shards: ShardFolder, encode: TokenEncoder, max_failures: int) -> None:
        self.shards, self.encode, self.max_failures = shards, encode, max_failures
        self.rank, self.world_size, self.local_rank = fabric.global_rank, fabric.world_size, fabric.local_rank
        self.parent = os.getppid()
        self.failed: dict[str, str] = {}  # messages for undecodable images of all ranks, by key
        self.seen_records: set[Path] = set()  # records whose messages are in `failed`
        self.images_per_s: float | None = None

    def run(self, source: ImageSource, order: NDArray[np.int64], batch_size: int, num_workers: int) -> None:
        """Writes this rank's missing shards, with the examples in the given `order`.

        Raises:
            InputError: if too many images cannot be decoded.
        """
        plan, size = self.shards.plan, self.shards.plan.shard_size
        examples = source if plan.views == 1 else Views(source, plan.views, plan.seed, plan.flips)
        self.failed = Manifest.load(self.shards.folder).failures()
        batches_of = {
            index: batched(order[index * size : (index + 1) * size].tolist(), batch_size)
            for index in self.shards.missing()
        }
        # One loader for all shards lets its workers keep reading while a shard is written.
        loader = batch_loader(examples, (batch for batches in batches_of.values() for batch in batches), num_workers)
        encoded, start = self.encode(loader), time.monotonic()
        rank_suffix = f" (rank {self.rank} of {self.world_size})" if self.world_size > 1 else ""
        total = sum(len(batch) for batches in batches_of.values() for batch in batches)
        with tqdm(total=total, unit="img", desc=f"tokenize{rank_suffix}", disable=self.rank > 0) as bar:
            try:
                for index, batches in batches_of.items():
                    self.write(index, islice(encoded, len(batches)), bar)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise InputError(
                    "a process that decodes images was killed, perhaps for lack of memory: run again with fewer "
                    "--num_workers or a smaller --batch_size; it continues where it stopped"
                ) from error
        if total:
            self.images_per_s = total / (time.monotonic() - start)

    def write(self, index: int, batches: Iterator[EncodedBatch], bar: tqdm[Any]) -> None:
        """Writes one shard, followed by its record."""
        self.collect_failures()
        encoded, errors = [], dict[str, str]()
        for batch in batches:
            self.check_parent()
            for key, message in batch.errors:
                if key not in errors:
                    tqdm.write(f"skipped: {message}")
                errors[key] = self.failed[key] = message
            if len(self.failed) > self.max_failures:
                raise too_many_failures(len(self.failed), self.max_failures, [*self.failed.values()][-1])
            bar.update(len(batch.keys) + len(batch.errors))
            encoded.append(batch)
        tokens, labels, keys, _ = zip(*encoded, strict=True)
        all_keys = [key for batch in keys for key in batch]
        self.shards.write(index, np.concatenate(tokens), np.concatenate(labels), all_keys, errors)

    def collect_failures(self) -> None:
        """Adds the failures in shards that other ranks have finished in the meantime."""
        for path in set(record_paths(self.shards.folder)) - self.seen_records:
            self.failed |= read_record(path).skipped
            self.seen_records.add(path)

    def check_parent(self) -> None:
        """Raises InputError if the process that started this one has ended, which would have finalized the folder."""
        if self.local_rank > 0 and os.getppid() != self.parent:
            raise InputError(f"rank {self.rank} ends because rank 0 has ended: run the same command again to continue")


def shard_order(source: ImageSource, views: int) -> NDArray[np.int64]:
    """Returns the indices of all examples in the order of the shards, a fixed random permutation.

    If the source has read-locality groups, the images of a group stay together, and the groups are permuted.
    """
    rng = np.random.default_rng(ORDER_SEED)
    if source.groups is None:
        return rng.permutation(len(source) * views)
    positions = rng.permutation(int(source.groups.max()) + 1)
    images = np.argsort(positions[source.groups], kind="stable")
    return (images[:, None] * views + np.arange(views)).ravel()


def too_many_failures(count: int, allowed: int, message: str) -> InputError:
    if not allowed:
        return InputError(f"{message}: repair it, or skip up to N such images with --max_failures N")
    return InputError(f"{count} images cannot be decoded, more than --max_failures {allowed}; the last is {message}")
