"""The frozen network that an objective compares the trained one with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_mvar.checkpoints import WhichWeights, open_trained
from lightning_mvar.checkpoints.training import ReferenceRecord
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint_of
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.weights import InitialWeights, check_tokenizer, frozen_network


class Reference:
    """A frozen network. No module: it is neither trained nor saved; checkpoints record its path and fingerprint.

    Args:
        path: a checkpoint, a folder of `export` or a published file.
        kind: of a checkpoint, `ema` takes the averaged weights if it has them, `raw` the last ones.
        config: architecture of the trained network, which it must share.
        class_names: names of its classes, in label order.
        tokenizer: the tokenizer of the run, which must be its own.
        tokenizer_path: names the tokenizer in messages.

    Raises:
        InputError: if the network cannot be read, or is one of another architecture or tokenizer.
    """

    def __init__(
        self,
        path: str,
        kind: WhichWeights,
        config: MVARConfig,
        class_names: Sequence[str],
        tokenizer: Tokenizer,
        tokenizer_path: str,
    ) -> None:
        self.path = str(Path(path).expanduser().resolve())
        self.stored = open_trained(path, weights=kind)
        check_tokenizer(self.stored, tokenizer, tokenizer_path)
        self.weights = InitialWeights(self.stored, config, class_names)
        self.fingerprint = ""  # known after `identify`
        self.network: MVAR  # known after `build`

    def identify(self, strategy: Strategy) -> None:
        """Computes the fingerprint of its weights, on rank 0 alone; all ranks must call this."""
        fingerprint = fingerprint_of(self.stored.weights) if strategy.is_global_zero else ""
        self.fingerprint = strategy.broadcast(fingerprint)

    @property
    def record(self) -> ReferenceRecord:
        return ReferenceRecord(self.path, self.fingerprint)

    def build(self, strategy: Strategy) -> None:
        """Builds it block by block, sharded as it is built if the strategy shards."""
        self.network = frozen_network(self.weights, strategy)

    @torch.no_grad()
    def score(self, labels: Tensor, scale_inputs: Tensor, tokens: Tensor) -> Tensor:
        """Returns its cross entropy (b, l) of tokens (b, l), with the drop path that the trained network draws next.

        So the two differ by their weights alone. The published code of CCA also keeps the reference in training mode,
        but there each draws for itself.
        """
        self.network.train()
        with torch.random.fork_rng(devices=[labels.device] if labels.is_cuda else []):
            losses, _ = self.network.score(labels, scale_inputs, tokens)
        return losses


def require_same_reference(saved: ReferenceRecord | None, current: ReferenceRecord | None) -> None:
    """Raises InputError if a checkpoint and the run that continues it have other reference networks."""
    if (saved and saved.fingerprint) != (current and current.fingerprint):
        names = [f"{record.path} ({record.fingerprint})" if record else "no network" for record in (saved, current)]
        raise InputError(
            f"--ckpt_path is of a run whose objective has {names[0]} as its reference, but this run has {names[1]}: "
            f"set model.objective and its reference as before"
        )
