"""Writing and reading of a token shard, one tar file.

A folder of shards holds `manifest.json` and tar files in the WebDataset format, readable with plain `webdataset`. Each
tar sample is a pack of up to `PACK_SIZE` images, so that a reader slices arrays instead of running Python per image:

    KEY.tokens.npy   (n, l) uint16     all scales packed, coarse to fine
    KEY.labels.npy   (n,) int64        class of each image
    KEY.keys.json    n strings         source path or name of each image
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from lightning_mvar.data.tokens.manifest import WRITERS, Manifest, Shard
from lightning_mvar.data.tokens.packs import PACK_ERRORS, PACK_SIZE, CheckedPack, Pack, TokenSpec, read_packs
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path, remove_unfinished
from lightning_mvar.io.fingerprint import sha256_of

DAMAGED_REMEDY = (
    f"remove it, then restart if it is in a cache (it will be downloaded again), or rewrite it with the same {WRITERS}"
)


def write_shard(path: Path, tokens: NDArray[np.uint16], labels: NDArray[np.int64], keys: list[str]) -> Shard:
    """Writes one shard of tokens (n, l) atomically; its bytes depend only on the content.

    The caller must be its only writer, because temporary files left by killed processes of this host are removed.
    """
    remove_unfinished(path)
    with atomic_path(path) as temporary:
        with wds.TarWriter(str(temporary), user="", group="", mtime=0.0) as writer:
            for begin in range(0, len(labels), PACK_SIZE):
                part = slice(begin, begin + PACK_SIZE)
                name = f"{path.stem}-{begin:06d}"
                arrays = {"tokens.npy": tokens[part], "labels.npy": labels[part], "keys.json": keys[part]}
                writer.write({"__key__": name, **arrays})
        return Shard(path.name, len(labels), temporary.stat().st_size, sha256_of(temporary))


def read_shard(path: Path, shard: Shard, spec: TokenSpec) -> Iterator[Pack]:
    """Reads the packs of one shard; `ShardSource.fetch` compares the checksum.

    Args:
        path: the file.
        shard: its manifest entry.
        spec: properties that the manifest prescribes for every shard.

    Raises:
        InputError: if the file is missing, truncated or not a token shard, or contradicts the manifest.
    """
    samples = 0
    try:
        for name, members in read_packs(path):
            pack = CheckedPack(name, members, spec).pack()
            samples += len(pack.labels)
            yield pack
        if samples != shard.samples:
            raise ValueError(f"it holds {samples} samples, but the manifest says {shard.samples}")
    except PACK_ERRORS as error:
        raise damaged_shard(path, error) from error


def damaged_shard(path: Path, error: Exception) -> InputError:
    reason = str(error) or type(error).__name__
    return InputError(f"{path} is damaged or not a token shard ({reason}): {DAMAGED_REMEDY}")


def read_samples(manifest: Manifest, fetch: Callable[[Shard], Path], ids: list[int]) -> Pack:
    """Reads samples by their global index, in the order of `ids`.

    Args:
        manifest: manifest of the shards.
        fetch: returns a local file for a shard; called only for shards that hold one of the samples.
        ids: indices across all shards.

    Raises:
        InputError: if one of these shards is missing or damaged.
    """
    requested = set(ids)
    rows_by_id: dict[int, tuple[NDArray[np.uint16], np.int64, str]] = {}
    for shard, begin in zip(manifest.shards, manifest.offsets, strict=True):
        if any(begin <= index < begin + shard.samples for index in requested):
            packs = read_shard(fetch(shard), shard, manifest.spec)
            rows = (row for pack in packs for row in zip(*pack, strict=True))
            rows_by_id |= {index: row for index, row in enumerate(rows, start=begin) if index in requested}
    tokens, labels, keys = zip(*(rows_by_id[index] for index in ids), strict=True)
    return Pack(np.stack(tokens), np.array(labels), list(keys))
