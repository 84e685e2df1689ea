"""Short hashes that identify a module's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(module: nn.Module, description: str = "") -> str:
    """Returns 16 hex digits that hash `description` and all weights (as float32), equal on all machines and devices."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
