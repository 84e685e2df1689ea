"""Seeded damage to files of each kind that the package reads from others."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

CANARY = "code_was_run"  # file that a payload creates in the working folder
VALUES: list[Any] = [  # that replace a value of a JSON document
    None, True, [], {}, "", "x" * 5000, "../../climbs", "/climbs", "~/climbs", f"pipe:touch {CANARY}",
    "\x00", "nan", -1, 0, 1, 3.5, 10**9, 2**63, -(2**70), 1e308, float("nan"), float("inf"),
    [[]], [None], {"a": {"b": []}},
]  # fmt: skip
HEADERS: list[str] = [  # of npy files
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (18446744073709551616,), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (), }",
    "{'descr': '|u1', 'fortran_order': True, 'shape': (4, 8, 8, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (4, 8, 8, 3), }",
    "{'descr': [('a', '<u2'), ('b', 'O')], 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '|V1000000000', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (0,), }",
    f"{{'descr': __import__('os').system('touch {CANARY}'), 'fortran_order': False, 'shape': (4,), }}",
    "(" * 3000,
    "",
]
NAMES = ["../climbs.png", "/climbs.png", "a/../../climbs.png", "x" * 300 + ".png", "\x01/\n.png", "~/0.png", ".png"]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncates, flips, overwrites, repeats or inserts bytes, more often near the beginning."""
    content = bytearray(data)
    place = rng.randrange(min(len(content), 512) if rng.random() < 0.5 else len(content))
    kind = rng.randrange(6)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[place : place + 8] = b"\xff" * 8
    elif kind == 3:
        content[place:place] = content[place : place + rng.randrange(1, 600)]
    elif kind == 4:
        content[place:place] = bytes(rng.randrange(1, 600))
    else:
        content[place : place + 8] = rng.randbytes(8)
    return bytes(content)


def damaged_json(text: str, rng: random.Random) -> str:
    """Replaces, removes or repeats one value of a JSON document, or damages its text."""
    if rng.random() < 0.15:
        return rng.choice(
            [text[: len(text) // 2], "[" * 100_000, "", "null", f"\ufeff{text}", f"{text}{text}", '{"a":1e999}']
        )
    document = copy.deepcopy(json.loads(text))
    parent, key = rng.choice(list(places(document)))
    if rng.random() < 0.2:
        del parent[key]
    elif rng.random() < 0.1:
        parent[key] = [parent[key]] * 3
    else:
        parent[key] = rng.choice(VALUES)
    if rng.random() < 0.1:
        document["unknown"] = rng.choice(VALUES)
    return json.dumps(document)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each value inside a JSON document as its container and the key or index in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from places(value[key])


def damaged_npz(data: bytes, rng: random.Random) -> bytes:
    """Replaces the header of one array by a forged one under a right CRC, or damages the bytes of the archive."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    target = rng.choice(list(members))
    members[target] = damaged_npy(members[target], rng)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return written.getvalue()


def damaged_npy(data: bytes, rng: random.Random) -> bytes:
    """Replaces the header of an npy file by a forged one, or damages its bytes."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    (length,) = struct.unpack("<H", data[8:10])
    header = rng.choice(HEADERS).encode() + b"\n"
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mutates the JSON header of a safetensors file under its right length, or damages the bytes of the file."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = damaged_json(data[8 : 8 + length].decode(), rng).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damaged_tar(data: bytes, rng: random.Random) -> bytes:
    """Renames a member, damages its content, makes it a link, pipe or device, or damages the bytes of the archive."""
    kind = rng.randrange(6)
    if kind == 0:
        return damaged_bytes(data, rng)
    written = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=written, mode="w") as target:
        members = [member for member in source if member.isfile()]
        chosen = rng.choice(members)
        for member in members:
            file = source.extractfile(member)
            assert file is not None
            content = file.read()
            if member is chosen:
                if kind == 1:
                    member.name = rng.choice(NAMES)
                elif kind == 2:
                    content = damaged_npy(content, rng) if member.name.endswith(".npy") else damaged_bytes(content, rng)
                elif kind == 3:
                    member.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
                    member.linkname = rng.choice(["/etc/passwd", "../climbs", members[0].name, member.name])
                    content = b""
                elif kind == 4:
                    target.addfile(member, io.BytesIO(content))  # twice
                else:
                    member.name += rng.choice([".pyd", ".pickle", ".json", ".pth"])
                member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return written.getvalue()


def damaged_lines(text: str, rng: random.Random) -> str:
    """Replaces, removes, repeats or damages one line of a text."""
    lines = text.splitlines()
    index = rng.randrange(len(lines))
    hostile = [
        "",
        "\x00",
        "../climbs",
        "/climbs 1",
        "a b c d",
        "-1",
        "1e9",
        "name,label",
        "x" * 5000,
        "\u202e",
        lines[index] * 2,
    ]
    if rng.random() < 0.3:
        del lines[index]
    else:
        lines[index] = rng.choice(hostile)
    return "\n".join(lines) + rng.choice(["\n", "", "\r\n", "\x1a"])
