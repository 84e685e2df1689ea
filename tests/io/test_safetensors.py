"""Damaged .safetensors files: every one is refused in one line, within bounds."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import load_strictly, read_weights, save_weights


def with_header(header: Any, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> bytes:
    return with_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes})


DAMAGED = {
    "empty": b"",
    "short": b"\1\2\3",
    "cut header": entry()[:20],
    "cut data": entry()[:-1],
    "more data": entry() + b"x",
    "huge header": struct.pack("<Q", 2**60) + b"{}",
    "no JSON": with_header(b"{{{{"),
    "no UTF-8": with_header(b"\xff\xfe{}"),
    "a list": with_header([1]),
    "nested": with_header(b'{"a":' * 10**5),
    "unknown dtype": entry(dtype="F33"),
    "wrong dtype": entry(dtype="F64"),
    "NaN": with_header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "null": entry(shape=[None]),
    "negative": entry(shape=[-4]),
    "fraction": entry(shape=[4.0]),
    "huge": entry(shape=[2**62, 2**62]),
    "reversed offsets": entry(data_offsets=[16, 0]),
    "offsets beyond the end": entry(data_offsets=[0, 2**40], shape=[2**38]),
    "overlap": with_header(
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        }
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(InputError, match=r"weights\.safetensors is damaged or not a") as raised:
        read_weights(path)
    assert str(raised.value).isprintable()


def test_paths_that_are_no_files_are_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("", "is a folder"), ("nowhere", "does not exist"), ("fifo", "is not a regular file")):
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path / name)


def test_flipped_bits_are_refused_or_give_tensors_of_the_file_size(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int64)}, path)
    sound, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        forged = bytearray(sound)
        forged[rng.randrange(len(sound) - 88)] ^= 1 << rng.randrange(8)
        path.write_bytes(forged)
        try:
            weights = read_weights(path)
        except InputError:
            continue
        assert sum(tensor.nbytes for tensor in weights.values()) <= len(sound)


@pytest.mark.parametrize(
    ("dtype", "reads"),
    [
        *((dtype, True) for dtype in ("F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")),
        *((dtype, False) for dtype in ("I64", "U8", "BOOL", "C64", "F4")),
    ],
)
def test_other_floats_are_cast_and_other_numbers_refused(dtype: str, reads: bool, tmp_path: Path) -> None:
    size = {"F16": 2, "BF16": 2, "F64": 8, "I64": 8, "C64": 8, "F4": 0.5}.get(dtype, 1)
    sizes = {"dtype": dtype, "shape": [2], "data_offsets": [0, int(2 * size)]}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(with_header({"weight": sizes}, bytes(int(2 * size))))
    module = nn.PReLU(2)
    if reads:
        assert load_strictly(module, read_weights(path), path).weight.dtype == torch.float32
        return
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        load_strictly(module, read_weights(path), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    module = nn.Linear(2, 2)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert load_strictly(module, weights, "file") is module
    weights["bias"][1] = value
    with pytest.raises(InputError, match="file holds NaN or infinite values in bias"):
        load_strictly(module, weights, "file")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_says_who_reads_a_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_weights(nn.Linear(1, 1), tmp_path / "weights.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
