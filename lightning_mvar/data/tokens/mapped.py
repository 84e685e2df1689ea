"""Reads single samples of token shards through memory maps: only the requested rows are read, not complete shards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.data.tokens.manifest import Manifest, Shard
from lightning_mvar.data.tokens.packs import PACK_ERRORS, CheckedPack, Member, TokenSpec, find_packs, range_problem
from lightning_mvar.data.tokens.prefetch import Prefetcher
from lightning_mvar.data.tokens.shards import damaged_shard
from lightning_mvar.io.files import open_regular


class Layout(NamedTuple):
    """Positions of the p packs in a shard."""

    ends: NDArray[np.int64]  # (p,) number of samples up to and including each pack
    tokens: NDArray[np.int64]  # (p,) byte offset at which sample 0 of the shard would be if the pack began with it
    labels: NDArray[np.int64]  # (p,) the same for labels


class MappedShard:
    """The samples of one shard.

    Headers are checked once, values whenever they are read; `ShardSource.verify` compares the checksum.

    Args:
        path: the file.
        shard: its manifest entry.
        spec: properties that the manifest prescribes for every shard.
        layout: layout of the file, if it has been opened before.

    Raises:
        InputError: if the file is missing, truncated or not a token shard, or contradicts the manifest.
    """

    def __init__(self, path: Path, shard: Shard, spec: TokenSpec, layout: Layout | None = None) -> None:
        self.path, self.spec, self.bytes = path, spec, shard.bytes
        try:
            with open_regular(path) as file:
                self.mapping = mmap(file.fileno(), 0, access=ACCESS_READ)
                memory = np.frombuffer(self.mapping, np.uint8)
                if len(memory) != shard.bytes:
                    raise ValueError(f"it has {len(memory)} bytes, but the manifest says {shard.bytes}")
                self.token_bytes = 2 * (spec.num_tokens or 1)
                self.layout = layout or self.find_layout(memory, [*find_packs(file)], shard.samples)
        except PACK_ERRORS as error:
            raise damaged_shard(path, error) from error
        # Rows are windows at arbitrary bytes, so one indexing operation can copy rows of many packs.
        self.tokens = np.lib.stride_tricks.sliding_window_view(memory, self.token_bytes)
        self.labels = np.lib.stride_tricks.sliding_window_view(memory, 8)

    def find_layout(
        self, memory: NDArray[np.uint8], packs: list[tuple[str, dict[str, Member]]], samples: int
    ) -> Layout:
        """Checks the headers of all packs and locates their samples."""
        counts, begins = [], []
        for name, members in packs:
            content = {suffix: memory.data[begin : begin + size] for suffix, (_, begin, size) in members.items()}
            arrays = CheckedPack(name, content, self.spec, headers_only=True).arrays()
            counts.append(len(arrays[0]))
            begins.append([address(array) - address(memory) for array in arrays])
        if sum(counts) != samples:
            raise ValueError(f"it holds {sum(counts)} samples, but the manifest says {samples}")
        ends = np.cumsum(counts, dtype=np.int64)
        tokens, labels = np.array(begins, np.int64).T - (ends - counts) * np.array([[self.token_bytes], [8]])
        return Layout(ends, tokens, labels)

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Reads tokens (n, l) and labels (n,) of samples, given by their index in this shard.

        Raises:
            InputError: if a value is out of range, or the file has changed its size since it was opened.
        """
        try:
            if (size := self.mapping.size()) != self.bytes:  # reading past the end would kill the process
                raise ValueError(f"it has {size} bytes, but had {self.bytes} when it was opened")
        except PACK_ERRORS as error:  # also if the file was removed from a network file system
            raise damaged_shard(self.path, error) from error
        pack = np.searchsorted(self.layout.ends, rows, side="right")
        tokens = self.tokens[self.layout.tokens[pack] + rows * self.token_bytes].view(np.uint16)
        labels = self.labels[self.layout.labels[pack] + rows * 8].view(np.int64)[:, 0]
        for problem in (
            range_problem("tokens", tokens, self.spec.vocab_size),
            range_problem("labels", labels, self.spec.num_classes),
        ):
            if problem:
                raise damaged_shard(self.path, ValueError(f"it {problem} of {len(rows)} that were read"))
        return tokens, labels


def address(array: NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])


class SampleReader:
    """Reads samples by their index across all shards, and fetches shards in advance. It must be closed.

    Args:
        manifest: manifest of the shards.
        order: indices of the shards in the order in which they are needed.
        fetch: returns a local file for a shard.
        layouts: cache of layouts by shard index; layouts of newly opened shards are added.
        ahead: number of shards to fetch in advance; twice as many stay mapped.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Sequence[int],
        fetch: Callable[[Shard], Path],
        layouts: dict[int, Layout],
        ahead: int,
    ) -> None:
        self.manifest, self.layouts, self.max_open = manifest, layouts, 2 * ahead
        self.spec, self.offsets = manifest.spec, np.array(manifest.offsets, np.int64)
        self.positions = {index: position for position, index in enumerate(order)}
        self.files = Prefetcher(fetch, [manifest.shards[index] for index in order], ahead)
        self.open: OrderedDict[int, MappedShard] = OrderedDict()  # least recently used first

    def close(self) -> None:
        self.files.close()

    def read(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Returns tokens (n, l) and labels (n,); raises InputError if a shard is unavailable or damaged."""
        tokens = np.empty((len(ids), self.spec.num_tokens or 0), np.uint16)
        labels = np.empty(len(ids), np.int64)
        shard_of = np.searchsorted(self.offsets, ids, side="right") - 1
        for index in sorted(set(shard_of.tolist()), key=self.positions.__getitem__):
            own = shard_of == index
            tokens[own], labels[own] = self.mapped(index).read(ids[own] - self.offsets[index])
        return tokens, labels

    def mapped(self, index: int) -> MappedShard:
        if index not in self.open:
            if len(self.open) >= self.max_open:
                self.open.popitem(last=False)
            path = self.files.path(self.positions[index])
            shard = MappedShard(path, self.manifest.shards[index], self.spec, self.layouts.get(index))
            self.open[index], self.layouts[index] = shard, shard.layout
        self.open.move_to_end(index)
        return self.open[index]
