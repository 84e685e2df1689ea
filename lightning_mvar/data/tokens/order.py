"""The order of the samples in an epoch, computed from the sizes of the shards without reading them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.data.tokens.packs import PACK_SIZE


class EpochOrder:
    """Global order of one epoch, a function of (seed, epoch).

    Shards are shuffled, then samples within blocks. A block is a run of consecutive shuffled shards that ends with the
    first pack of `PACK_SIZE` samples that completes `block_size`. The permutations of all blocks come from one
    generator, so reaching a position requires permuting all blocks before it: about 40 ns per sample.

    Args:
        samples: number of samples of each shard.
        seed: shuffling seed; None keeps the stored order.
        epoch: number of the epoch.
        block_size: minimum number of samples that are shuffled together.
    """

    def __init__(self, samples: Sequence[int], seed: int | None, epoch: int, block_size: int) -> None:
        counts = np.array(samples, np.int64)
        self.rng = None if seed is None else np.random.default_rng([seed, epoch])
        self.shards = np.arange(len(counts)) if self.rng is None else self.rng.permutation(len(counts))
        self.ends = counts[self.shards].cumsum()  # position after each shard, in the order of `shards`
        self.begins = self.ends - counts[self.shards]
        self.shift = (counts.cumsum() - counts)[
            self.shards
        ] - self.begins  # added to a position, gives a sample's index
        self.block_size = block_size
        self.begin, self.end = 0, 0  # of the current block
        self.permutation = np.empty(0, np.int64)

    def ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the indices, across all shards, of the samples at ascending positions.

        Each call must start in the block in which the previous call ended, or later.
        """
        if self.rng is None:
            return positions
        parts = []
        while len(positions):
            while positions[0] >= self.end:
                self.permute_next_block()
            count = int(np.searchsorted(positions, self.end))
            parts.append(self.begin + self.permutation[positions[:count] - self.begin])
            positions = positions[count:]
        stored = np.concatenate(parts)
        return stored + self.shift[np.searchsorted(self.ends, stored, side="right")]

    def permute_next_block(self) -> None:
        assert self.rng is not None
        self.begin = self.end
        target = min(self.begin + self.block_size, int(self.ends[-1]))
        shard = int(np.searchsorted(self.ends, target))
        begin = int(self.begins[shard])
        packs = -(-(target - begin) // PACK_SIZE)
        self.end = min(begin + packs * PACK_SIZE, int(self.ends[shard]))
        self.permutation = self.rng.permutation(self.end - self.begin)
