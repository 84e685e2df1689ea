"""Hashes that identify a module's weights, or the content of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from lightning_mvar.io.files import open_regular

CHUNK_BYTES = 2**20


def fingerprint(module: nn.Module, description: str = "") -> str:
    """Returns 16 hex digits that hash `description` and all weights (as float32), equal on all machines and devices."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a regular file as hex digits; raises InputError if it cannot be opened."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
