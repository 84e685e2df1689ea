"""`tokenize`: images to token shards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli.arguments import call
from lightning_mvar.cli.ranks import ranks
from lightning_mvar.data.images.examples import ImageSource, Views, batch_loader, batched
from lightning_mvar.data.images.sources import IMAGE_CACHE, open_images
from lightning_mvar.data.tokens.encode import Encoded, TokenEncoder
from lightning_mvar.data.tokens.shards import (
    MANIFEST,
    Manifest,
    read_record,
    records_of,
    save_record,
    shard_name,
    write_shard,
)
from lightning_mvar.devices import Precision
from lightning_mvar.errors import InputError
from lightning_mvar.io.locks import alone_in
from lightning_mvar.tokenizer.tokenizer import Tokenizer

ORDER_SEED = 0  # images go into the shards in one fixed random order, so that every shard has all classes
LONGEST_WAIT = timedelta(days=30)  # of a rank that is done for the others


def tokenize(
    images: str,
    tokenizer: str,
    out: str,
    labels: str | None = None,
    class_names: str | None = None,
    views: int = 1,
    flips: bool = False,
    seed: int = 0,
    shard_size: int = 10_000,
    batch_size: int = 64,
    num_workers: int = 0,
    max_failures: int = 0,
    cache_dir: str = IMAGE_CACHE,
    retries: int = 5,
    precision: Precision = "float32",
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> None:
    """Turn images into token shards. Started again, on as many devices as one likes, it goes on where it stopped.

    Args:
        images: a folder of class folders (CLASS/NAME.png|jpg|jpeg|webp); ImageNet's tar of tars, a tar of class
            folders, or tars of a class each; WebDataset shards with .cls, as a folder or a pattern
            (train-{0000..0146}.tar); Parquet files with image and label; or `digits:train`, `photos:test` and the like.
            Archives may be elsewhere: https://HOST/train-{0000..0146}.tar, or a command that prints one, such as
            `pipe:aws s3 cp s3://BUCKET/train-{0000..0146}.tar -`.
        tokenizer: folder that `train-tokenizer` or `export` wrote.
        out: folder for the shards and their manifest.
        labels: for images without classes, such as ILSVRC2012_img_val.tar: a file with lines `NAME CLASS`, or CLASS
            alone in the order of the names, or ILSVRC2012_devkit_t12.tar.gz.
        class_names: where classes are numbers, what they are called: `imagenet`, or a file with a name on each line.
        views: 1 for the centre crop of each image, more for that many random crops of it.
        flips: mirror half of the random crops.
        seed: of the random crops.
        shard_size: samples in a shard.
        batch_size: images encoded at once.
        num_workers: processes of each device that decode images; 0 decodes in the process that encodes.
        max_failures: images that may be undecodable and are left out; each is named, and listed in the manifest.
        cache_dir: folder on this machine for archives from elsewhere; nothing is ever removed from it.
        retries: attempts to read an archive from elsewhere, after one that failed: 1, 2, 4, ... seconds later.
        precision: of the encoder; codes are chosen in float32.
        device: auto, cpu, cuda or cuda:N.
        devices: processes on each machine, each with a GPU of its own where `device` is cuda.
        num_nodes: machines; start the same command on each, by torchrun or Slurm.
    """
    if min(views, shard_size, batch_size) < 1 or min(num_workers, max_failures, retries) < 0:
        raise InputError(
            "--views, --shard_size and --batch_size must be at least 1; --num_workers, --max_failures and --retries at "
            "least 0"
        )
    if flips and views == 1:
        raise InputError("--flips is for random crops: it needs --views 2 or more")
    folder = Path(out)
    if folder.is_file():
        raise InputError(f"--out {folder} is a file; name a folder")
    # Nothing is computed together: a rank only waits for the others in the end, and hears at once if one has died.
    strategy = DDPStrategy(process_group_backend="gloo", timeout=LONGEST_WAIT)
    with ranks(device, devices, num_nodes, strategy) as fabric, ExitStack() as stack:
        model = load_tokenizer(tokenizer)
        source = open_images(images, model.config.shape, "skip", labels, class_names, cache_dir, retries)
        order = shard_order(source, views)
        plan = plan_of(model, source, images, order, shard_size)
        plan = replace(plan, views=views, seed=seed if views > 1 else 0, flips=flips, precision=precision)
        if fabric.is_global_zero:
            stack.enter_context(alone_in(folder, "tokenize"))
            begin(folder, plan)
        fabric.barrier()
        if not Manifest.load(folder).same_run(plan):
            raise InputError(f"rank {fabric.global_rank} has other images, or another tokenizer, than rank 0")
        work = Work(fabric, folder, plan, TokenEncoder(model, fabric.device, precision), max_failures)
        work.run(source, order, batch_size, num_workers)
        fabric.barrier()
        if fabric.is_global_zero:
            finish(folder, work.rate)


def plan_of(model: Tokenizer, source: ImageSource, name: str, order: NDArray[np.int64], shard_size: int) -> Manifest:
    """The manifest of the images that are called `name`, in this order, before there are shards."""
    return Manifest(
        side_lengths=list(model.config.schedule.side_lengths),
        vocab_size=model.config.vocab_size,
        class_names=source.class_names,
        tokenizer=model.fingerprint(),
        source=name,
        num_images=len(source),
        shard_size=shard_size,
        order=sha256(order.tobytes()).hexdigest(),
        listing=source.listing,
    )


def begin(folder: Path, plan: Manifest) -> None:
    """Write the manifest of a folder that is to be filled.

    Raises:
        InputError: if the folder holds shards of something else.
    """
    if not (folder / MANIFEST).is_file():
        plan.save(folder)
    elif not Manifest.load(folder).same_run(plan):
        raise InputError(
            f"{folder} holds shards of other images, another tokenizer, or other --views, --flips, --seed, --precision "
            f"or --shard_size: choose another --out, or remove that folder"
        )


def finish(folder: Path, images_per_s: float | None) -> None:
    manifest = Manifest.load(folder)
    manifest.save(folder)
    skipped = f", {len(manifest.skipped)} images skipped" if manifest.skipped else ""
    rate = "" if images_per_s is None else f"; {images_per_s:.1f} images/s on each device"
    print(f"{manifest.num_samples} samples in {len(manifest.shards)} shards in {folder}{skipped}{rate}")
    if not manifest.num_samples:
        raise InputError(f"not one image of {manifest.source} could be decoded; the manifest in {folder} names them")


class Work:
    """One rank's shards: every so-manieth, whatever is done already, so that ranks need not talk.

    Args:
        fabric: which rank of how many.
        folder: of the shards, with its manifest.
        plan: what the shards hold.
        encode: batches of images to tokens.
        max_failures: see `tokenize`.
    """

    def __init__(self, fabric: Fabric, folder: Path, plan: Manifest, encode: TokenEncoder, max_failures: int) -> None:
        self.folder, self.plan, self.encode, self.max_failures = folder, plan, encode, max_failures
        self.rank, self.world_size, self.local_rank = fabric.global_rank, fabric.world_size, fabric.local_rank
        self.parent = os.getppid()
        self.failed: dict[str, str] = {}  # messages of images that cannot be decoded, by key, of all ranks
        self.seen: set[Path] = set()  # parts whose messages are among them
        self.rate: float | None = None  # images/s

    def run(self, source: ImageSource, order: NDArray[np.int64], batch_size: int, num_workers: int) -> None:
        """Write what is missing, of the examples in their `order`.

        Raises:
            InputError: if too many images cannot be decoded.
        """
        plan, size = self.plan, self.plan.shard_size
        examples = source if plan.views == 1 else Views(source, plan.views, plan.seed, plan.flips)
        todo = self.missing()
        cut = {index: batched(order[index * size : (index + 1) * size].tolist(), batch_size) for index in todo}
        # One loader for all shards: its processes read on while a shard is written.
        loader = batch_loader(examples, (batch for batches in cut.values() for batch in batches), num_workers)
        encoded, start = self.encode(loader), time.monotonic()
        several = f" (rank {self.rank} of {self.world_size})" if self.world_size > 1 else ""
        total = sum(len(batch) for batches in cut.values() for batch in batches)
        with tqdm(total=total, unit="img", desc=f"tokenize{several}", disable=self.rank > 0) as bar:
            try:
                for index, batches in cut.items():
                    self.write(index, islice(encoded, len(batches)), bar)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise InputError(
                    "a process that decodes images was killed, perhaps for memory: start again, it goes on, with fewer "
                    "--num_workers or a smaller --batch_size"
                ) from error
        if total:
            self.rate = total / (time.monotonic() - start)

    def missing(self) -> list[int]:
        """Numbers of this rank's shards that are not there, or are damaged."""
        manifest = Manifest.load(self.folder)
        there = {shard.name: shard for shard in manifest.shards}
        self.failed = manifest.failures()
        mine = range(self.rank, self.plan.num_shards, self.world_size)
        show = self.rank > 0 or not there
        return [
            index
            for index in tqdm(mine, desc="verify finished shards", leave=False, disable=show)
            if (found := there.get(shard_name(index))) is None or not found.is_intact(self.folder)
        ]

    def write(self, index: int, batches: Iterator[Encoded], bar: tqdm[Any]) -> None:
        """Write a shard, and then what is known of it."""
        self.hear_of_failures()
        done, errors = [], dict[str, str]()
        for batch in batches:
            self.check_parent()
            for key, message in batch.errors:
                if key not in errors:
                    tqdm.write(f"skipped: {message}")
                errors[key] = self.failed[key] = message
            if len(self.failed) > self.max_failures:
                raise too_many(len(self.failed), self.max_failures, [*self.failed.values()][-1])
            bar.update(len(batch.keys) + len(batch.errors))
            done.append(batch)
        tokens, labels, keys, _ = zip(*done, strict=True)
        names = [key for batch in keys for key in batch]
        shard = write_shard(self.folder / shard_name(index), np.concatenate(tokens), np.concatenate(labels), names)
        shard.skipped = errors
        save_record(self.folder, shard)

    def hear_of_failures(self) -> None:
        """Read what other ranks have met since."""
        for part in set(records_of(self.folder)) - self.seen:
            self.failed |= read_record(part).skipped
            self.seen.add(part)

    def check_parent(self) -> None:
        """End with the process that started this one: nobody would wait for what it does."""
        if self.local_rank > 0 and os.getppid() != self.parent:
            raise InputError(f"rank {self.rank} ends because rank 0 has: the same command goes on with what is missing")


def shard_order(source: ImageSource, views: int) -> NDArray[np.int64]:
    """Numbers of all examples in the order in which they go into the shards, a fixed random one.

    Images that are best read together stay together, in random order of their groups.
    """
    rng = np.random.default_rng(ORDER_SEED)
    if source.groups is None:
        return rng.permutation(len(source) * views)
    places = rng.permutation(int(source.groups.max()) + 1)
    images = np.argsort(places[source.groups], kind="stable")
    return (images[:, None] * views + np.arange(views)).ravel()


def too_many(count: int, allowed: int, message: str) -> InputError:
    if not allowed:
        return InputError(f"{message}: repair it, or leave out up to N such images with --max_failures N")
    return InputError(f"{count} images cannot be decoded, more than --max_failures {allowed}; the last is {message}")


def main(argv: list[str]) -> None:
    call(tokenize, argv)
