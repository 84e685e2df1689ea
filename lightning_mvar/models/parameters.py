"""Parameters with special treatment: kept in float32, excluded from weight decay, or matrices of the blocks."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

# Suffixes of parameter names. Decays and temperatures get exponentiated, which amplifies rounding.
KEEP_FLOAT32 = ("A_log", "dt_bias", "decay_log", "qk_scale_log")
UNDECAYED = ("start_embed", "pos_embed", "scale_embed.weight", "adaln_table", *KEEP_FLOAT32)


def lower_precision(network: Network, dtype: torch.dtype) -> Network:
    """Casts a network's weights in place for faster sampling in less memory, except `KEEP_FLOAT32` and the head."""
    kept = {
        name: parameter.data
        for name, parameter in network.named_parameters()
        if name.endswith(KEEP_FLOAT32) or name.startswith("head")
    }
    network.to(dtype)
    for name, value in kept.items():
        network.get_parameter(name).data = value
    return network


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Returns whether a parameter is the matrix of a linear layer in a block, or a convolution kernel of a tokenizer.

    AdaLN's matrices do not count, because their input is a class embedding, nor do kernels that read or write pixels or
    codes.
    """
    if parameter.ndim == 4:
        return ".levels." in name or ".middle." in name
    return ".blocks." in f".{name}" and parameter.ndim == 2 and name.endswith(".weight") and ".adaln." not in name
