"""Freezing of parameters, selected by name patterns."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR


def freeze_parameters(network: MVAR, patterns: Sequence[str]) -> None:
    """Disables the gradients of parameters, so that optimizers ignore them.

    Args:
        network: the network, possibly on the meta device.
        patterns: name patterns, where * stands for any text, ? and [0-3] for one character; a pattern that begins with
            ! unfreezes names. The last pattern that matches a name applies.

    Raises:
        InputError: if a pattern matches no name, or nothing is left to train.
    """
    trained = {name: True for name, _ in network.named_parameters()}
    for pattern in patterns:
        matched = [name for name in trained if fnmatchcase(name, pattern.removeprefix("!"))]
        if not matched:
            some = ", ".join([*trained][:: max(1, len(trained) // 6)])
            raise InputError(f"model.freeze: {pattern!r} matches no parameter; their names are like {some}")
        trained |= dict.fromkeys(matched, pattern.startswith("!"))
    if not any(trained.values()):
        raise InputError(f"model.freeze {', '.join(patterns)} leaves nothing to train: exclude names with !PATTERN")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trained[name])


def trainable_parameters(config: MVARConfig, patterns: Sequence[str]) -> int:
    """Returns the number of trained parameters; raises InputError as `freeze_parameters` does."""
    with torch.device("meta"):
        network = MVAR(config)
    freeze_parameters(network, patterns)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
