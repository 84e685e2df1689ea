"""Streams token batches in an order that depends only on (seed, epoch) and can be resumed at any batch.

Every epoch has one global order: shards are shuffled, then samples within blocks of consecutive shards. Global batch i
is the i-th slice of that order; each rank takes its part of every global batch, and each of n workers every n-th batch.
So one process and many see the same batches, and a run resumed with another number of workers or devices continues in
the same order. The price is that every rank reads every shard; tokens are small (all of ImageNet at 256 px is 1.7 GB
per epoch), and a rank only slices arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_mvar.data.resumable import ResumableLoader, ignore_signals_in_worker
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.shards import read_shard
from lightning_mvar.data.tokens.sources import ShardSource
from lightning_mvar.errors import InputError

Block = tuple[NDArray[np.uint16], NDArray[np.int64], NDArray[np.int64]]  # tokens (n, l), labels (n,), ids (n,)


class TokenBatch(NamedTuple):
    """One rank's part of a global batch."""

    tokens: Tensor  # (b, l) int64
    labels: Tensor  # (b,) int64
    valid: Tensor  # (b,) bool; False for repeated samples that pad the batch
    ids: Tensor  # (b,) int64 index of each sample, counted through all shards


class TokenRows(NamedTuple):
    """One rank's part of a global batch as numpy arrays; see `TokenBatch`."""

    tokens: NDArray[np.uint16]
    labels: NDArray[np.int64]
    valid: NDArray[np.bool_]
    ids: NDArray[np.int64]


class TokenStream(IterableDataset[TokenRows]):
    """Streams one rank's batches of one pass over a set of shards.

    Args:
        shards: source of the shards.
        manifest: manifest of the shards.
        batch_size: images per rank.
        seed: shuffling seed, used together with the epoch; None keeps the stored order.
        block_size: number of samples held in memory and shuffled together.
        rank, world_size: select this process's part of every global batch.

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
    ) -> None:
        self.shards, self.manifest, self.seed, self.block_size = shards, manifest, seed, block_size
        self.batch_size, self.rank, self.global_batch = batch_size, rank, batch_size * world_size
        self.epoch, self.first_batch = 0, 0
        # Shards whose checksums were right: in shared memory, because every epoch starts new workers.
        self.verified = torch.zeros(len(manifest.shards), dtype=torch.bool).share_memory_()
        if len(self) == 0:
            raise InputError(
                f"{shards} has {manifest.num_samples} samples, fewer than one global batch of {self.global_batch}: "
                f"lower --data.batch_size or --data.global_batch_size"
            )

    def __len__(self) -> int:
        """Number of batches per rank: shuffled passes drop an incomplete global batch, ordered passes pad it."""
        full, rest = divmod(self.manifest.num_samples, self.global_batch)
        return full + (1 if rest and self.seed is None else 0)

    def __iter__(self) -> Iterator[TokenRows]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        begin = self.rank * self.batch_size
        for i, (tokens, labels, ids) in enumerate(self.global_batches()):
            if i < self.first_batch or (i - self.first_batch) % num_workers != worker_id:
                continue
            positions = np.arange(begin, begin + self.batch_size)
            rows = positions % len(labels)  # an incomplete last batch is padded with its own samples
            yield TokenRows(tokens[rows], labels[rows], positions < len(labels), ids[rows])

    def global_batches(self) -> Iterator[Block]:
        """Splits the epoch into global batches; the last one of an ordered pass may be shorter."""
        size, count = self.global_batch, 0
        rest: Block | None = None
        for block in self.blocks():
            if rest is not None:
                block = concatenate([rest, block])
            end = len(block[1]) - len(block[1]) % size
            for begin in range(0, end, size):
                count += 1
                yield select_rows(block, slice(begin, begin + size))
            rest = select_rows(block, slice(end, None))
        if count < len(self) and rest is not None:
            yield rest

    def blocks(self) -> Iterator[Block]:
        """Yields samples in the epoch's order, about `block_size` at a time."""
        shards, offsets = self.manifest.shards, self.manifest.offsets
        rng = None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        order = range(len(shards)) if rng is None else rng.permutation(len(shards)).tolist()
        packs: list[Block] = []
        for i in order:
            path, begin = self.shards.fetch(shards[i], verify=not self.verified[i]), offsets[i]
            self.verified[i] = True
            for pack in read_shard(path, shards[i], self.manifest.spec):
                packs.append((pack.tokens, pack.labels, np.arange(begin, begin + len(pack.labels))))
                begin += len(pack.labels)
                if sum(len(labels) for _, labels, _ in packs) >= self.block_size:
                    yield merge(packs, rng)
                    packs = []
        if packs:
            yield merge(packs, rng)


def merge(blocks: list[Block], rng: np.random.Generator | None) -> Block:
    """Concatenates blocks and shuffles their samples, unless `rng` is None."""
    block = concatenate(blocks)
    return block if rng is None else select_rows(block, rng.permutation(len(block[1])))


def concatenate(blocks: list[Block]) -> Block:
    tokens, labels, ids = zip(*blocks, strict=True)
    return np.concatenate(tokens), np.concatenate(labels), np.concatenate(ids)


def select_rows(block: Block, rows: slice | NDArray[np.int64]) -> Block:
    tokens, labels, ids = block
    return tokens[rows], labels[rows], ids[rows]


class TokenLoader(ResumableLoader):
    """Loads batches of tokens (`TokenBatch`) from a `TokenStream`."""

    source: TokenStream

    def batches(self) -> Iterable[TokenBatch]:
        loader = DataLoader(
            self.source,
            batch_size=None,
            collate_fn=identity,
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals_in_worker,
        )
        return (self.to_batch(rows) for rows in loader)

    def to_batch(self, rows: TokenRows) -> TokenBatch:
        """Converts arrays to tensors in the main process: workers send a uint16 array much faster than a tensor."""
        tensors = [torch.from_numpy(rows.tokens.astype(np.int64)), *map(torch.from_numpy, rows[1:])]
        return TokenBatch(*(tensor.pin_memory() if self.pin_memory else tensor for tensor in tensors))


def identity(rows: Any) -> Any:
    return rows
