"""Streams token batches in an order that depends only on (seed, epoch) and can be resumed at any batch.

Every epoch has one global order, see `EpochOrder`. Global batch i is the i-th slice of that order; each rank takes its
part of every global batch, and each of n workers every n-th batch. Any number of processes therefore sees the same
batches, and a run resumed with other numbers of workers or devices continues in the same order. A rank reads only its
own samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_mvar.data.resumable import ResumableLoader, worker_options
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.mapped import Layout, SampleReader
from lightning_mvar.data.tokens.order import EpochOrder
from lightning_mvar.data.tokens.sources import ShardSource
from lightning_mvar.errors import InputError


class TokenBatch(NamedTuple):
    """One rank's part of a global batch."""

    tokens: Tensor  # (b, l) int64
    labels: Tensor  # (b,) int64
    valid: Tensor  # (b,) bool; False for repeated samples that pad the batch
    ids: Tensor  # (b,) int64 index of each sample across all shards
    own: Tensor | None = None  # (b,) bool; True for the network's own samples, if the batch has any


class TokenRows(NamedTuple):
    """One rank's part of a global batch as numpy arrays; see `TokenBatch`."""

    tokens: NDArray[np.uint16]
    labels: NDArray[np.int64]
    valid: NDArray[np.bool_]
    ids: NDArray[np.int64]
    own: NDArray[np.bool_] | None = None


class TokenStream(IterableDataset[TokenRows]):
    """Streams one rank's batches in one pass over a set of shards.

    Args:
        shards: source of the shards.
        manifest: manifest of the shards.
        batch_size: images per rank.
        seed: shuffling seed, combined with the epoch; None keeps the stored order.
        block_size: number of samples that are shuffled together.
        rank, world_size: select this process's part of every global batch.
        verified: whether the checksums of all shards on this machine have been compared.

    Raises:
        InputError: if there are fewer samples than a global batch.
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
        verified: bool = False,
    ) -> None:
        self.shards, self.manifest, self.seed, self.block_size = shards, manifest, seed, block_size
        self.batch_size, self.rank, self.global_batch = batch_size, rank, batch_size * world_size
        self.verified = verified
        self.epoch, self.first_batch = 0, 0
        self.layouts: dict[int, Layout] = {}  # layouts of the shards that this process has read, by index
        if len(self) == 0:
            raise InputError(
                f"{shards} has {manifest.num_samples} samples, fewer than one global batch of {self.global_batch}: "
                f"lower --data.batch_size or --data.global_batch_size (of `bench data`, --batch_size or --world_size)"
            )

    def __len__(self) -> int:
        """Number of batches per rank: shuffled passes drop an incomplete global batch, ordered passes pad it."""
        full, rest = divmod(self.manifest.num_samples, self.global_batch)
        return full + (1 if rest and self.seed is None else 0)

    def verify(self) -> None:
        """Compares the checksums of the shards on this machine, once; downloads are compared when they arrive.

        Raises:
            InputError: if a shard is damaged.
        """
        if not self.verified:
            self.shards.verify(self.manifest.shards)
            self.verified = True

    def __iter__(self) -> Iterator[TokenRows]:
        yield from self.rows(self.epoch, worker_part(range(self.first_batch, len(self))))

    def rows(self, epoch: int, batches: Iterable[int]) -> Iterator[TokenRows]:
        """Yields this rank's part of the global batches with these ascending numbers."""
        shards, total = self.manifest.shards, self.manifest.num_samples
        order = EpochOrder([shard.samples for shard in shards], self.seed, epoch, self.block_size)
        shards_per_block = 2 + self.block_size * len(shards) // total
        fetch = partial(self.shards.fetch, verify=False)
        reader = SampleReader(self.manifest, order.shards.tolist(), fetch, self.layouts, shards_per_block)
        with closing(reader):
            rows = self.rank * self.batch_size + np.arange(self.batch_size)
            for i in batches:
                begin = i * self.global_batch
                count = min(self.global_batch, total - begin)
                ids = order.ids(begin + rows % count)  # an incomplete last batch is padded with its own samples
                yield TokenRows(*reader.read(ids), rows < count, ids)


class PairedStream(IterableDataset[TokenRows]):
    """Streams batches whose first half is real and whose second half consists of the network's own samples.

    An epoch is a pass over the real samples. Own samples have epochs of their own: their batches are numbered
    continuously from the first epoch, so any position can be resumed.

    Args:
        real: stream of the real samples, with half of the images per rank.
        own: stream of as many own samples per batch.
    """

    def __init__(self, real: TokenStream, own: TokenStream) -> None:
        self.real, self.own = real, own
        self.epoch, self.first_batch, self.global_batch = 0, 0, real.global_batch

    def __len__(self) -> int:
        return len(self.real)

    def verify(self) -> None:
        self.real.verify()
        self.own.verify()

    def __iter__(self) -> Iterator[TokenRows]:
        batches = worker_part(range(self.first_batch, len(self)))
        begin = self.epoch * len(self)
        pairs = zip(self.real.rows(self.epoch, batches), self.own_rows(begin + i for i in batches), strict=True)
        for real, own in pairs:
            tokens, labels = np.concatenate([real.tokens, own.tokens]), np.concatenate([real.labels, own.labels])
            valid, ids = np.concatenate([real.valid, own.valid]), np.concatenate([real.ids, own.ids])
            yield TokenRows(tokens, labels, valid, ids, np.arange(len(ids)) >= len(real.ids))

    def own_rows(self, batches: Iterable[int]) -> Iterator[TokenRows]:
        """Yields batches of own samples, given their continuous numbers."""
        length = len(self.own)
        for epoch, numbers in groupby(batches, key=lambda number: number // length):
            yield from self.own.rows(epoch, (number % length for number in numbers))


def worker_part(batches: range) -> range:
    """Returns the part of a loader's batches that this worker process reads: every n-th of n workers."""
    worker = get_worker_info()
    return batches if worker is None else batches[worker.id :: worker.num_workers]


class TokenLoader(ResumableLoader):
    """Loads batches of tokens (`TokenBatch`) from a stream."""

    source: TokenStream | PairedStream

    def batches(self) -> Iterable[TokenBatch]:
        self.source.verify()
        loader = DataLoader(
            self.source,
            batch_size=None,
            collate_fn=identity,
            **worker_options(self.num_workers),
        )
        return (self.to_batch(rows) for rows in loader)

    def to_batch(self, rows: TokenRows) -> TokenBatch:
        """Converts arrays to tensors in the main process, because workers send a uint16 array much faster."""
        arrays = [array for array in rows[1:] if array is not None]
        tensors = [torch.from_numpy(rows.tokens.astype(np.int64)), *map(torch.from_numpy, arrays)]
        return TokenBatch(*(tensor.pin_memory() if self.pin_memory else tensor for tensor in tensors))


def identity(rows: Any) -> Any:
    return rows
