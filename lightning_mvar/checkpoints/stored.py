"""Networks on disk whose weights are read on use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mvar.checkpoints.pair import TrainedModel
from lightning_mvar.checkpoints.sharded import ShardedTensors, read_all
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import load_strictly
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class StoredModel:
    """A network on disk and its tokenizer.

    Args:
        source: name of the file in messages.
        config: architecture of the network.
        weights: tensors by name, read on use from a mapped file, or at each access from a sharded checkpoint. Names and
            shapes have not been checked yet.
        class_names: names of the classes in label order; empty if they have none.
        load_tokenizer: loads the tokenizer and checks that it fits the network.
        part: for a checkpoint, the module to which the weights belong: network or ema.
        tokenizer_fingerprint: fingerprint of the tokenizer; None if unknown before the tokenizer is loaded.
        tokenizer_folder: folder, published file or name of the tokenizer; None if published weights do not name it.
    """

    source: str
    config: MVARConfig
    weights: Mapping[str, Tensor]
    class_names: list[str]
    load_tokenizer: Callable[[], Tokenizer]
    part: str = "network"
    tokenizer_fingerprint: str | None = None
    tokenizer_folder: str | None = None

    def load(self) -> TrainedModel:
        """Loads network and tokenizer, in eval mode on the CPU.

        Raises:
            InputError: if weights are missing, damaged or have another shape, or the tokenizer does not fit.
        """
        return TrainedModel(self.load_network(), self.load_tokenizer(), self.class_names)

    def load_network(self) -> MVAR:
        """Loads only the network; raises InputError if weights are missing, damaged or have another shape."""
        mapped = not isinstance(self.weights, ShardedTensors)
        return load_strictly(self.meta_network(), read_all(self.weights), self.source, copy=mapped)

    def meta_network(self) -> MVAR:
        """Builds the network on the meta device; raises InputError if the weights have fewer blocks."""
        blocks = {name.split(".")[1] for name in self.weights if name.startswith("blocks.")}
        if self.config.depth > max(len(blocks), 1):  # fails before too many blocks are built
            raise InputError(
                f"{self.source} does not fit MVAR: its weights have {len(blocks)} blocks, not {self.config.depth}"
            )
        with torch.device("meta"):
            return MVAR(self.config)
