"""Pairs of a network and the tokenizer whose tokens it predicts."""

from __future__ import annotations

from typing import NamedTuple

from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig


class TrainedModel(NamedTuple):
    """Network, tokenizer and class names in label order; both modules in eval mode on the CPU."""

    network: MVAR
    tokenizer: Tokenizer
    class_names: list[str]


def check_pair(network: MVARConfig, tokenizer: TokenizerConfig, name: str) -> None:
    """Raises InputError unless the network predicts tokens of the tokenizer; messages call the tokenizer `name`.

    Fields that are None, as in incomplete `NetworkOptions`, fit any tokenizer.
    """
    for field in ("schedule", "vocab_size", "code_dim"):
        ours, theirs = getattr(network, field), getattr(tokenizer, field)
        if ours is not None and ours != theirs:
            raise InputError(f"{name} does not fit the network: {field} is {theirs} there, {ours} in the network")
