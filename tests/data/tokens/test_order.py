"""The order of batches equals that of a plain reader of whole shards, and a rank reads its own samples only."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_token_shards

from lightning_mvar.data.tokens import mapped
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.packs import PACK_SIZE
from lightning_mvar.data.tokens.shards import read_shard
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.stream import TokenRows, TokenStream
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import sha256_of

SIZES = [1300, 700, PACK_SIZE, 3, 1100, 2 * PACK_SIZE, 40]
Block = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_token_shards(folder, "abc", SIZES)
    return folder


def merge(packs: list[Block], rng: np.random.Generator | None) -> Block:
    block = tuple(np.concatenate(arrays) for arrays in zip(*packs, strict=True))
    rows = slice(None) if rng is None else rng.permutation(len(block[1]))
    return tuple(array[rows] for array in block)  # type: ignore[return-value]


def reference_samples(folder: Path, manifest: Manifest, seed: int | None, epoch: int, block_size: int) -> Block:
    """Reads every pack of every shard and shuffles whole blocks, as a single process would."""
    rng = None if seed is None else np.random.default_rng([seed, epoch])
    order = range(len(manifest.shards)) if rng is None else rng.permutation(len(manifest.shards)).tolist()
    blocks, packs = [], []
    for i in order:
        begin = manifest.offsets[i]
        for pack in read_shard(folder / manifest.shards[i].name, manifest.shards[i], manifest.spec):
            packs.append((pack.tokens, pack.labels, np.arange(begin, begin + len(pack.labels))))
            begin += len(pack.labels)
            if sum(len(labels) for _, labels, _ in packs) >= block_size:
                blocks.append(merge(packs, rng))
                packs = []
    if packs:
        blocks.append(merge(packs, rng))
    return merge(blocks, None)


def reference_batches(samples: Block, batch_size: int, rank: int, world_size: int, padded: bool) -> Iterator[TokenRows]:
    size = batch_size * world_size
    for begin in range(0, len(samples[1]) - (0 if padded else size - 1), size):
        tokens, labels, ids = (array[begin : begin + size] for array in samples)
        positions = np.arange(rank * batch_size, (rank + 1) * batch_size)
        rows = positions % len(labels)
        yield TokenRows(tokens[rows], labels[rows], positions < len(labels), ids[rows])


@pytest.mark.parametrize("block_size", [1, 600, 2000, 10_000])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (5, 3), (None, 0)])
@pytest.mark.parametrize(("batch_size", "world_size"), [(64, 1), (7, 3), (600, 4)])
def test_every_batch_equals_that_of_a_reader_of_everything(
    folder: Path, block_size: int, seed: int | None, epoch: int, batch_size: int, world_size: int
) -> None:
    shards = LocalShards(folder)
    manifest = shards.manifest()
    samples = reference_samples(folder, manifest, seed, epoch, block_size)
    for rank in range(world_size):
        stream = TokenStream(shards, manifest, batch_size, seed, block_size, rank, world_size)
        stream.epoch, stream.first_batch = epoch, 1
        expected = list(reference_batches(samples, batch_size, rank, world_size, seed is None))
        assert len(expected) == len(stream)
        for batch, reference in zip(stream, expected[1:], strict=True):
            assert batch.own is None
            for ours, theirs in zip(batch[:4], reference[:4], strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)


def test_a_rank_reads_its_own_samples_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_read = 0
    read = mapped.MappedShard.read

    def count(self: mapped.MappedShard, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal rows_read
        rows_read += len(rows)
        return read(self, rows)

    monkeypatch.setattr(mapped.MappedShard, "read", count)
    shards = LocalShards(folder)
    stream = TokenStream(shards, shards.manifest(), 4, 0, 600, 17, 32)
    stream.first_batch = len(stream) - 5
    assert len([*stream]) == 5
    assert rows_read == 5 * 4


def repack(path: Path, pack_size: int, order: str = "C") -> None:
    """Writes a shard again with packs of another size and odd offsets, as another program might."""
    with tarfile.open(path) as tar:
        members = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    tokens, labels = (np.load(BytesIO(members[name])) for name in ("tokens.npy", "labels.npy"))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for begin in range(0, len(labels), pack_size):
            part = slice(begin, begin + pack_size)
            for name, array in (("labels.npy", labels[part]), ("tokens.npy", np.asarray(tokens[part], order=order))):
                file = BytesIO()
                np.lib.format.write_array(file, array, version=(2, 0))
                add(tar, f"./x/{begin}.{name}", file.getvalue())
            add(
                tar,
                f"./x/{begin}.keys.json",
                json.dumps(["x"] * len(labels[part])).encode(),
            )


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), 1.5  # type: ignore[assignment]  # a fraction needs an extended header
    tar.addfile(info, BytesIO(content))


def repacked(folder: Path, pack_size: int, order: str = "C") -> Manifest:
    manifest = write_token_shards(folder, "abc", [50, 50, 20])
    for shard in manifest.shards:
        path = folder / shard.name
        repack(path, pack_size, order)
        shard.bytes, shard.sha256 = path.stat().st_size, sha256_of(path)
    manifest.save(folder)
    return manifest


@pytest.mark.parametrize("pack_size", [1, 7, 50])
def test_packs_of_other_sizes_give_the_same_batches(tmp_path: Path, pack_size: int) -> None:
    ours = write_token_shards(tmp_path / "ours", "abc", [50, 50, 20])
    theirs = repacked(tmp_path / "theirs", pack_size)
    batches = [
        [*TokenStream(LocalShards(tmp_path / name), manifest, 6, 1, 60, 0, 1)]
        for name, manifest in (("ours", ours), ("theirs", theirs))
    ]
    for a, b in zip(*batches, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_arrays_in_column_order_are_refused(tmp_path: Path) -> None:
    manifest = repacked(tmp_path, 10, "F")
    for use in (
        lambda: [*TokenStream(LocalShards(tmp_path), manifest, 6, None, 60, 0, 1)],
        lambda: [*read_shard(tmp_path / "000000.tar", manifest.shards[0], manifest.spec)],
    ):
        with pytest.raises(InputError, match=r"000000\.tar is damaged .*tokens\.npy is in Fortran order"):
            use()


def test_a_shard_that_shrinks_after_it_was_verified_is_an_error(tmp_path: Path) -> None:
    manifest = write_token_shards(tmp_path, "abc", [50])
    path = tmp_path / "000000.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(InputError, match=r"000000\.tar is damaged .*it has \d+ bytes, but the manifest says \d+"):
        list(TokenStream(LocalShards(tmp_path), manifest, 6, None, 60, 0, 1))


def test_a_shard_that_is_cut_while_it_is_open_is_told(tmp_path: Path) -> None:
    write_token_shards(tmp_path, "abc", [40])
    manifest = Manifest.load(tmp_path)
    path = manifest.shards[0].path_in(tmp_path)
    shard = mapped.MappedShard(path, manifest.shards[0], manifest.spec)
    rows = np.arange(40)
    assert len(shard.read(rows)[1]) == 40
    with open(path, "r+b") as file:
        file.truncate(0)  # a read of the mapped file would kill the process
    with pytest.raises(
        InputError, match=rf"{path.name} is damaged .*it has 0 bytes, but had {manifest.shards[0].bytes}"
    ):
        shard.read(rows)


def test_a_shard_that_a_network_file_system_has_lost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_shards(tmp_path, "abc", [40])
    manifest = Manifest.load(tmp_path)
    shard = mapped.MappedShard(manifest.shards[0].path_in(tmp_path), manifest.shards[0], manifest.spec)
    lost = SimpleNamespace(size=lambda: os.stat(tmp_path / "removed").st_size)
    monkeypatch.setattr(shard, "mapping", lost)
    with pytest.raises(InputError, match=rf"{manifest.shards[0].name} is damaged"):
        shard.read(np.arange(4))
