"""Batches of exact number, in an order that depends on (seed, epoch) alone, that can be gone on with at any place.

Every epoch has one global order: images shuffled, or shards shuffled, and then samples within blocks of consecutive
shards. Global batch i is the i-th slice of it; each rank takes its part of every global batch and each worker its turn
of the batches. So one process and many see the same batches, and a run that is resumed with other workers or devices
goes on in the same order. The price is that every rank reads every shard; tokens are small (all of ImageNet at 256 px
is 1.7 GB an epoch), and a rank only slices arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_mvar.data.resumable import ResumableLoader, leave_signals_to_the_main_process
from lightning_mvar.data.tokens.shards import Manifest, read_shard
from lightning_mvar.data.tokens.sources import ShardSource
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
