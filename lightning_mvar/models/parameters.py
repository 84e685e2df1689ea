"""Parameters that need special care: those kept in float32, and those without weight decay."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)

# Ends of parameter names. Decays over all tokens and temperatures get exponentiated.
KEEP_FLOAT32 = ("A_log", "dt_bias", "decay_log", "qk_scale_log")
UNDECAYED = ("start_embed", "pos_embed", "scale_embed.weight", "adaln_table", *KEEP_FLOAT32)


def lower_precision(network: Network, dtype: torch.dtype) -> Network:
    """Casts a network's weights in place, to sample with less memory and time; `KEEP_FLOAT32` and the head stay."""
    kept = {
        name: parameter.data
        for name, parameter in network.named_parameters()
        if name.endswith(KEEP_FLOAT32) or name.startswith("head")
    }
    network.to(dtype)
    for name, value in kept.items():
        network.get_parameter(name).data = value
    return network
