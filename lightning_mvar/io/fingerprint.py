"""Hashes that identify the weights of a module or the content of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mvar.io.files import open_regular

CHUNK_BYTES = 2**20


def fingerprint(module: nn.Module, description: str = "") -> str:
    """Hashes `description` and all weights as float32; returns 16 hex digits, the same on all machines and devices."""
    return fingerprint_of(module.state_dict(), description)


def fingerprint_of(weights: Mapping[str, Tensor], description: str = "") -> str:
    """Returns the fingerprint of named weights, reading one at a time; see `fingerprint`."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a regular file as hex digits; raises InputError if it cannot be opened."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
