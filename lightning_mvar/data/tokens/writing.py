"""Writing of a folder of token shards by any number of ranks, each of which may be killed at any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_mvar.data.tokens.manifest import MANIFEST, Manifest, save_record, shard_name
from lightning_mvar.data.tokens.shards import write_shard
from lightning_mvar.devices import is_first_rank, rank_and_world_size, wait_for_ranks
from lightning_mvar.errors import InputError


class ShardFolder:
    """A folder of shards that is written or continued; finished shards are kept.

    Each rank is responsible for every world_size-th shard, done or not, so ranks need no communication while writing.
    All ranks must call each method while rank 0 holds the lock of the folder.

    Args:
        folder: folder of the shards.
        plan: manifest without shards yet.
        option: option that names the folder, for messages.

    Raises:
        InputError: if the folder holds shards of another plan, or this rank has another plan than rank 0.
    """

    def __init__(self, folder: Path, plan: Manifest, option: str) -> None:
        self.folder, self.plan = folder, plan
        if is_first_rank():
            if (folder / MANIFEST).is_file():
                if not (found := Manifest.load(folder)).same_run(plan):
                    content = describe(found, plan)
                    raise InputError(f"{folder} holds {content}: choose another {option}, or remove that folder")
            else:
                plan.save(folder)
        wait_for_ranks()
        if not Manifest.load(folder).same_run(plan):
            what = "a different network" if plan.sampling else "different images"
            raise InputError(f"rank {rank_and_world_size()[0]} has {what}, or a different tokenizer, than rank 0")

    def missing(self) -> list[int]:
        """Returns the indices of this rank's shards that are missing or damaged."""
        finished = {shard.name: shard for shard in Manifest.load(self.folder).shards}
        rank, world_size = rank_and_world_size()
        indices = range(rank, self.plan.num_shards, world_size)
        hide_bar = rank > 0 or not finished
        return [
            index
            for index in tqdm(indices, desc="verify finished shards", leave=False, disable=hide_bar)
            if (shard := finished.get(shard_name(index))) is None or not shard.is_intact(self.folder)
        ]

    def write(
        self,
        index: int,
        tokens: NDArray[np.uint16],
        labels: NDArray[np.int64],
        keys: list[str],
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        """Writes one shard of tokens (n, l), then its record; `skipped` maps keys of unreadable images to messages."""
        shard = write_shard(self.folder / shard_name(index), tokens, labels, keys)
        shard.skipped = dict(skipped or {})
        save_record(self.folder, shard)

    def finish(self) -> Manifest:
        """Waits for the shards of all ranks, moves their records into the manifest and returns it.

        Raises:
            InputError: if a shard is missing.
        """
        wait_for_ranks()
        if is_first_rank():
            manifest = Manifest.load(self.folder)
            manifest.check_finished(self.folder, self.folder / MANIFEST)
            manifest.save(self.folder)
            for leftover in self.folder.glob(".*.tmp.tar"):  # not in use: all ranks have finished writing
                leftover.unlink(missing_ok=True)
        wait_for_ranks()
        return Manifest.load(self.folder)


def describe(found: Manifest, plan: Manifest) -> str:
    """Describes how the contents of a folder differ from `plan`."""
    ours, theirs = found.sampling, plan.sampling
    if ours is None and theirs is None:
        options = "--views, --flips, --seed, --margin, --precision or --shard_size"
        return f"shards of other images, another tokenizer, or other {options}"
    if ours is None or theirs is None:
        return f"shards of images, {found.source!r:.200}" if ours is None else "samples of a network"
    values = [asdict(found) | ours, asdict(plan) | theirs]
    name = next(name for name in [*theirs, *values[0]] if values[0].get(name) != values[1].get(name))
    before, now = (f"{value.get(name)!s:.80}" for value in values)
    return f"samples drawn with other settings ({name} {before}, not {now})"
