"""Batches of exact number, in an order that depends on (seed, epoch) alone, that can be gone on with at any place.

Every epoch has one global order: images shuffled, or shards shuffled, and then samples within blocks of consecutive
shards. Global batch i is the i-th slice of it; each rank takes its part of every global batch and each worker its turn
of the batches. So one process and many see the same batches, and a run that is resumed with other workers or devices
goes on in the same order. The price is that every rank reads every shard; tokens are small (all of ImageNet at 256 px
is 1.7 GB an epoch), and a rank only slices arrays.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_mvar.data.images import Crop, Example, ImageBatch, ImageSource, collate, generator_for
from lightning_mvar.data.remote import ShardSource
from lightning_mvar.data.shards import Manifest, read_shard
from lightning_mvar.errors import InputError

Block = tuple[NDArray[np.uint16], NDArray[np.int64], NDArray[np.int64]]  # tokens (n, l), labels (n,), ids (n,)


class TokenBatch(NamedTuple):
    """One rank's part of a global batch."""

    tokens: Tensor  # (b, l) int64
    labels: Tensor  # (b,) int64
    valid: Tensor  # (b,) bool; False where the batch was filled up with repeated samples
    ids: Tensor  # (b,) int64 number of each sample in its folder, counted through the shards


class TokenRows(NamedTuple):
    """The same as arrays, as they come from the shards."""

    tokens: NDArray[np.uint16]
    labels: NDArray[np.int64]
    valid: NDArray[np.bool_]
    ids: NDArray[np.int64]


class TokenStream(IterableDataset[TokenRows]):
    """One pass over the shards of a folder.

    Args:
        shards: where they are.
        manifest: their manifest.
        batch_size: images per rank.
        seed: shuffles, together with the epoch; None keeps the order of the shards.
        block_size: samples shuffled together, in memory at once.
        rank, world_size: which part of every global batch is this process's.
    """

    def __init__(
        self,
        shards: ShardSource,
        manifest: Manifest,
        batch_size: int,
        seed: int | None,
        block_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.shards, self.manifest, self.seed, self.block_size = shards, manifest, seed, block_size
        self.batch_size, self.rank, self.global_batch = batch_size, rank, batch_size * world_size
        self.epoch, self.first_batch = 0, 0
        if len(self) == 0:
            raise InputError(
                f"{shards} has {manifest.num_samples} samples, fewer than one global batch of {self.global_batch}: "
                f"lower --data.batch_size"
            )

    def __len__(self) -> int:
        """Batches of every rank: shuffled passes drop what does not fill a global batch, ordered ones fill it up."""
        full, rest = divmod(self.manifest.num_samples, self.global_batch)
        return full + (1 if rest and self.seed is None else 0)

    def __iter__(self) -> Iterator[TokenRows]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        begin = self.rank * self.batch_size
        for i, (tokens, labels, ids) in enumerate(self.global_batches()):
            if i < self.first_batch or (i - self.first_batch) % workers != turn:
                continue
            positions = np.arange(begin, begin + self.batch_size)
            rows = positions % len(labels)  # an unfilled last batch is filled up with its own samples
            yield TokenRows(tokens[rows], labels[rows], positions < len(labels), ids[rows])

    def global_batches(self) -> Iterator[Block]:
        """The epoch cut into global batches, the last one of an ordered pass shorter."""
        size, count = self.global_batch, 0
        rest: Block | None = None
        for block in self.blocks():
            if rest is not None:
                block = joined([rest, block])
            whole = len(block[1]) - len(block[1]) % size
            for begin in range(0, whole, size):
                count += 1
                yield taken(block, slice(begin, begin + size))
            rest = taken(block, slice(whole, None))
        if count < len(self) and rest is not None:
            yield rest

    def blocks(self) -> Iterator[Block]:
        """Samples in the epoch's order, about `block_size` at a time."""
        shards = list(zip(self.manifest.shards, self.manifest.offsets, strict=True))
        rng = None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        if rng is not None:
            shards = [shards[i] for i in rng.permutation(len(shards))]
        held: list[Block] = []
        for shard, begin in shards:
            for pack in read_shard(self.shards.fetch(shard)):
                held.append((pack.tokens, pack.labels, np.arange(begin, begin + len(pack.labels))))
                begin += len(pack.labels)
                if sum(len(labels) for _, labels, _ in held) >= self.block_size:
                    yield shuffled(held, rng)
                    held = []
        if held:
            yield shuffled(held, rng)


def shuffled(blocks: list[Block], rng: np.random.Generator | None) -> Block:
    block = joined(blocks)
    return block if rng is None else taken(block, rng.permutation(len(block[1])))


def joined(blocks: list[Block]) -> Block:
    tokens, labels, ids = zip(*blocks, strict=True)
    return np.concatenate(tokens), np.concatenate(labels), np.concatenate(ids)


def taken(block: Block, rows: slice | NDArray[np.int64]) -> Block:
    tokens, labels, ids = block
    return tokens[rows], labels[rows], ids[rows]


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


class ResumableLoader(ABC):
    """A loader as Lightning's loops want it: sized, and with a position in the epoch that is checkpointed.

    Every pass is a new epoch, except the first one after `load_state_dict`, which goes on at the saved position. The
    state says where the next batch comes from: {epoch, samples}, the same on every rank, and in samples, so that it
    means the same to a run with another global batch.

    Args:
        source: what to read, with a length in batches, `global_batch`, and `epoch` and `first_batch` to set.
        num_workers: processes that read ahead.
        pin_memory: whether batches are to be copied to a GPU.
    """

    def __init__(self, source: TokenStream | ShuffledImages, num_workers: int, pin_memory: bool) -> None:
        self.source, self.num_workers, self.pin_memory = source, num_workers, pin_memory
        self.epoch, self.position, self.resumed = -1, 0, False
        # How many batches have been trained on, where that is known: one that was handed out but interrupted is to
        # come again. Counted from `skipped` on.
        self.trained: Callable[[], int] = lambda: self.position
        self.skipped = 0
        self.limit = lambda: len(self)  # batches of an epoch that are used

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = False
        self.skipped = self.position - self.trained()
        self.source.epoch, self.source.first_batch = self.epoch, self.position
        for batch in self.batches():
            self.position += 1
            yield batch

    @abstractmethod
    def batches(self) -> Iterable[Any]:
        """This rank's batches of the source's epoch, from its first batch on."""

    def state_dict(self) -> dict[str, int]:
        position = min(self.position, self.skipped + self.trained())
        if self.epoch < 0 or position >= self.limit():
            return {"epoch": self.epoch + 1, "samples": 0}
        return {"epoch": self.epoch, "samples": position * self.source.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["samples"] // self.source.global_batch
        if self.position >= len(self):  # larger batches than when it was saved, and the rest does not fill one
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = True


class TokenLoader(ResumableLoader):
    """Batches of tokens (`TokenBatch`) from a `TokenStream`."""

    source: TokenStream

    def batches(self) -> Iterable[TokenBatch]:
        loader = DataLoader(
            self.source,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_main_process,
        )
        return (self.batch(rows) for rows in loader)

    def batch(self, rows: TokenRows) -> TokenBatch:
        """Made here rather than in a worker: to hand over a tensor takes milliseconds, an array of uint16 far less."""
        tensors = [torch.from_numpy(rows.tokens.astype(np.int64)), *map(torch.from_numpy, rows[1:])]
        return TokenBatch(*(tensor.pin_memory() if self.pin_memory else tensor for tensor in tensors))


def as_it_is(rows: Any) -> Any:
    return rows


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


def leave_signals_to_the_main_process(worker: int) -> None:
    """A cluster sends them to all processes of a job, and a worker that died would take the run with it."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=end_when_the_main_process_asks, daemon=True).start()


def end_when_the_main_process_asks() -> None:
    """Python ends the workers that are left at exit by SIGTERM, and waits for them: that one is to be heeded."""
    main = multiprocessing.parent_process()
    while main and signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)
