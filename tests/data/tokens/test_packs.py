"""Hostile, damaged and odd tar files in place of a token shard are an error at once that names the file."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_token_shards

from lightning_mvar.data.tokens import sources
from lightning_mvar.data.tokens.manifest import Shard
from lightning_mvar.data.tokens.packs import TokenSpec
from lightning_mvar.data.tokens.shards import read_shard
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.stream import TokenLoader, TokenStream
from lightning_mvar.data.tokens.verify import find_problems
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import sha256_of

Members = dict[str, bytes]
SPEC = TokenSpec(30, 48, 10)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sound_members(count: int = 4) -> Members:
    return {
        "0.tokens.npy": npy(np.zeros((count, 30), np.uint16)),
        "0.labels.npy": npy(np.arange(count)),
        "0.keys.json": json.dumps([f"image{i}" for i in range(count)]).encode(),
    }


def tar_of(members: Members) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def with_size(block: bytes, size: int) -> bytes:
    """Returns a tar header with a size in binary, perhaps negative, and a right checksum."""
    block = block[:124] + (b"\xff" * 4 if size < 0 else b"\x80\0\0\0") + struct.pack(">q", size) + block[136:]
    checksum = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % checksum + block[156:]


def read_all(path: Path, samples: int = 4) -> int:
    return sum(len(pack.labels) for pack in read_shard(path, Shard(path.name, samples, 0, ""), SPEC))


def test_extended_headers_are_skipped(tmp_path: Path) -> None:
    pax = b"30 mtime=1700000000.123456789\n"
    (tmp_path / "0.tar").write_bytes(
        header("pax", len(pax), tarfile.XHDTYPE) + pax.ljust(512, b"\0") + tar_of(sound_members())
    )
    assert read_all(tmp_path / "0.tar") == 4


ZEROS = bytes(512)
TARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "negative size": (lambda: with_size(header("0.tokens.npy", 0), -1024) + ZEROS, "cannot have -1024 bytes"),
    "size of 8 EB": (lambda: with_size(header("0.tokens.npy", 0), 2**62) + ZEROS, "cannot have 4611686018427387904"),
    "size beyond the end": (lambda: header("0.tokens.npy", 10**7) + ZEROS, "truncated in the middle of 0.tokens.npy"),
    "sparse": (lambda: header("0.tokens.npy", 512, tarfile.GNUTYPE_SPARSE) + ZEROS, "is not a regular file"),
    "symlink": (lambda: header("0.tokens.npy", 0, tarfile.SYMTYPE), "is not a regular file"),
    "hard link": (lambda: header("0.tokens.npy", 0, tarfile.LNKTYPE), "is not a regular file"),
    "device": (lambda: header("0.tokens.npy", 0, tarfile.CHRTYPE), "is not a regular file"),
    "digits without end": (
        lambda: header("pax", 2**20, tarfile.XHDTYPE) + b"1" * 2**20 + tar_of(sound_members() | {"0.x": b""}),
        "has x, which does not belong in a token shard",
    ),
    "damaged second header": (lambda: tar_of(sound_members())[:1024] + b"x" * 512, "no header of .* at byte 1024: "),
    "gzip": (lambda: gzip.compress(tar_of(sound_members())), "no header of an uncompressed tar file at byte 0: "),
    "nothing": (lambda: b"", "it holds 0 samples, but the manifest says 4"),
    "name of two lines": (lambda: header("a\nb.tokens.npy", 0), "a member whose name is not printable"),
    "zeros": (lambda: bytes(2**20), "it holds 0 samples, but the manifest says 4"),
    "web page": (lambda: b"<!doctype html>" * 99, "bad checksum|invalid header"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_an_error(tmp_path: Path, name: str) -> None:
    content, message = TARS[name]
    (tmp_path / "0.tar").write_bytes(content())
    with pytest.raises(InputError, match=rf"0\.tar is damaged or not a token shard \(.*({message})") as error:
        read_all(tmp_path / "0.tar")
    assert "\n" not in str(error.value)


def many(text: bytes) -> bytes:
    return b"[" + b",".join([text] * 200_000) + b"]"


PACKS: dict[str, tuple[Members, str]] = {
    "token out of range": ({"0.tokens.npy": npy(np.full((4, 30), 48, np.uint16))}, r"120 tokens outside \[0, 48\)"),
    "label out of range": ({"0.labels.npy": npy(np.array([0, 1, 10, -1]))}, r"2 labels outside \[0, 10\)"),
    "other length": (
        {"0.tokens.npy": npy(np.zeros((4, 29), np.uint16))},
        "29 tokens per sample, but the manifest's .* 30",
    ),
    "other type": ({"0.tokens.npy": npy(np.zeros((4, 30), np.int32))}, "is int32 of shape"),
    "no samples": (sound_members(0), "has no samples"),
    "fewer labels": ({"0.labels.npy": npy(np.arange(3))}, "4 in tokens.npy, 3 in labels.npy, 4 in keys.json"),
    "fewer keys": ({"0.keys.json": b'["a"]'}, "4 in tokens.npy, 4 in labels.npy, 1 in keys.json"),
    "many keys": ({"0.keys.json": many(b'""')}, "has 600001 bytes, too many for 4 images"),
    "nested keys": ({"0.keys.json": b"[" * 9_000}, "keys.json is not JSON"),
    "keys of other types": ({"0.keys.json": b"[[], {}, 1e308, null]"}, "keys.json is not a list of strings"),
    "keys that are no text": ({"0.keys.json": b"\xff\xfe\x00"}, "keys.json is not JSON"),
    "not an array": ({"0.labels.npy": b"x"}, "labels.npy is not a numpy array"),
    "unknown member": ({"0.pyd": b""}, "has pyd, which does not belong in a token shard"),
    "long unknown member": ({f"0.{'x' * 90}": b""}, "which does not belong in a token shard"),
}


@pytest.mark.parametrize("name", PACKS)
def test_a_pack_that_contradicts_the_manifest_is_an_error(tmp_path: Path, name: str) -> None:
    changes, message = PACKS[name]
    (tmp_path / "0.tar").write_bytes(tar_of(sound_members() | changes))
    with pytest.raises(InputError, match=rf"0\.tar is damaged or not a token shard \(.*{message}") as error:
        read_all(tmp_path / "0.tar")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "replace", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)]
)
def test_only_a_regular_file_is_a_shard(tmp_path: Path, replace: Callable[[Path], None]) -> None:
    manifest = write_token_shards(tmp_path, "abc", [20, 20])
    path = tmp_path / "000001.tar"
    path.unlink()
    replace(path)
    shards = LocalShards(tmp_path)
    with pytest.raises(InputError, match=r"000001\.tar"):
        shards.manifest()
    with pytest.raises(InputError, match=r"000001\.tar"):
        shards.fetch(manifest.shards[1])
    assert [problem.file.name for problem in find_problems(tmp_path)] == ["000001.tar"]


def test_every_flipped_bit_is_told_before_a_sample_of_its_shard_is_used(tmp_path: Path) -> None:
    manifest = write_token_shards(tmp_path, "abc", [20, 20, 20])
    path = tmp_path / "000001.tar"
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        loader = TokenLoader(TokenStream(LocalShards(tmp_path), manifest, 4, 0, 1, 0, 1), 0, pin_memory=False)
        seen: list[int] = []
        with pytest.raises(InputError, match=r"000001\.tar is damaged: its SHA-256 is not the manifest's; copy it ag"):
            seen.extend(int(i) for batch in loader for i in batch.ids)
        assert not set(seen) & set(range(20, 40))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_shard_is_verified_in_the_first_epoch_only(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_token_shards(tmp_path / "shards", "abc", [20, 20, 20])
    hashed = tmp_path / "hashed"

    def record(path: Path) -> str:
        with open(hashed, "a") as file:
            file.write(f"{path.name}\n")
        return sha256_of(path)

    monkeypatch.setattr(sources, "sha256_of", record)
    stream = TokenStream(LocalShards(tmp_path / "shards"), manifest, 4, 0, 1, 0, 1)
    loader = TokenLoader(stream, workers, pin_memory=False)
    list(loader)
    first = hashed.read_text().split()
    assert set(first) == {shard.name for shard in manifest.shards}
    list(loader)
    assert hashed.read_text().split() == first


def test_values_are_checked_even_if_the_checksum_is_that_of_the_manifest(tmp_path: Path) -> None:
    manifest = write_token_shards(tmp_path, "abc", [20])
    for field, value, message in (
        ("vocab_size", 40, "tokens outside"),
        ("class_names", ["a", "b"], "labels outside"),
        ("side_lengths", [1, 2, 3, 5], "30 tokens per sample, but the manifest's schedule has 39"),
    ):
        changed = json.loads((tmp_path / "manifest.json").read_text()) | {field: value}
        (tmp_path / "other.json").write_text(json.dumps(changed))
        other = type(manifest).parse((tmp_path / "other.json").read_bytes(), "other.json")
        with pytest.raises(InputError, match=rf"000000\.tar is damaged .*{message}"):
            list(TokenStream(LocalShards(tmp_path), other, 4, None, 100, 0, 1))
