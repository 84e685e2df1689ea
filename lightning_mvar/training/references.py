"""The frozen network to which an objective compares the trained one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mvar.checkpoints import WhichWeights, open_trained
from lightning_mvar.checkpoints.training import ReferenceRecord
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint_of
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.strategies import build_network, shard_function
from lightning_mvar.training.weights import InitialWeights, check_tokenizer


class Reference:
    """A frozen network. It is not a module, so it is neither trained nor saved; checkpoints record its fingerprint.

    Args:
        path: a checkpoint, a folder of `export` or a published file.
        kind: for a checkpoint, `ema` uses the averaged weights if it has them, `raw` the last ones.
        config: architecture of the trained network, which the frozen one must share.
        class_names: class names of the trained network, in label order.
        tokenizer: tokenizer of the run, which the frozen network must share.
        tokenizer_path: names the tokenizer in messages.
        strategy: strategy of the run; all ranks must construct this.

    Raises:
        InputError: if the network cannot be read, or differs in architecture, classes or tokenizer.
    """

    def __init__(
        self,
        path: str,
        kind: WhichWeights,
        config: MVARConfig,
        class_names: Sequence[str],
        tokenizer: Tokenizer,
        tokenizer_path: str,
        strategy: Strategy,
    ) -> None:
        stored = open_trained(path, weights=kind)
        remedy = "name a network of this tokenizer with --model.objective.reference"
        check_tokenizer(stored, tokenizer, tokenizer_path, remedy)
        self.weights, self.strategy = InitialWeights(stored, config, class_names), strategy
        if self.weights.adapters:
            difference = "another scale schedule" if "pos_embed" in self.weights.adapters else "other classes"
            raise InputError(
                f"the reference {path} has {difference} than this run: fine-tune it to the data first, then name the "
                f"result with --model.objective.reference"
            )
        fingerprint = strategy.broadcast(fingerprint_of(stored.weights) if strategy.is_global_zero else "")
        self.record = ReferenceRecord(str(Path(path).expanduser().resolve()), fingerprint)
        self.network: MVAR  # available after `build`

    def build(self) -> None:
        """Builds the network block by block; if the strategy shards, each block is sharded as soon as it is built."""
        shard = shard_function(self.strategy)
        network = build_network(self.weights.config, self.strategy.root_device, 0, shard, self.weights.load)
        self.network = network.requires_grad_(False).eval()

    def check_samples(self, own: Manifest, location: object) -> None:
        """Checks that this network drew the tokens of `data.own`; warns if it used guidance or truncation.

        Args:
            own: manifest of the tokens.
            location: names them in messages.

        Raises:
            InputError: if they are tokens of images or of another network, or do not say how they were drawn.
        """
        settings, path = own.sampling, self.record.path
        remedy = f"draw them with `lightning-mvar sample --ckpt_path {path} --tokens FOLDER`"
        if settings is None:
            raise InputError(f"data.own {location} holds tokens of images, not samples of {path}: {remedy}")
        if (network := settings.get("network")) != self.record.fingerprint:
            raise InputError(
                f"data.own {location} holds samples of the network {network:.80}, but the reference {path} is "
                f"{self.record.fingerprint}: {remedy}, or set model.objective.reference to their network (of a "
                f"checkpoint, model.weights_kind must be the --weights of `sample`)"
            )
        try:
            guidance = max(map(float, settings["guidance"].split(",")))  # one number, or one per scale
            top_k, top_p = (float(settings[name]) for name in ("top_k", "top_p"))
        except (KeyError, ValueError):
            raise InputError(f"data.own {location} does not say how its samples were drawn: {remedy}") from None
        others = [
            f", {name} {settings[name]}" for name in ("temperature", "guidance_beta", "drafts") if name in settings
        ]
        if guidance != 0 or top_p not in (0, 1) or 0 < top_k < own.vocab_size or others:
            rank_zero_warn(
                f"data.own {location} was drawn with guidance {guidance:g}, top_k {top_k:g}, top_p {top_p:g}"
                f"{''.join(others)}, but the objective assumes samples of the plain network: sample with --guidance 0 "
                f"--top_k 0 --top_p 0 and without other options"
            )

    @torch.no_grad()
    def score(self, labels: Tensor, scale_inputs: Tensor, tokens: Tensor) -> Tensor:
        """Returns its cross entropy (b, l) for tokens (b, l), with the drop path that the trained network draws next.

        The two therefore differ only in their weights. The published code of CCA also keeps the reference in training
        mode, but with separate draws.
        """
        self.network.train()
        with torch.random.fork_rng(devices=[labels.device] if labels.is_cuda else []):
            losses, _ = self.network.score(labels, scale_inputs, tokens)
        return losses


def require_same_reference(saved: ReferenceRecord | None, current: ReferenceRecord | None) -> None:
    """Raises InputError if a checkpoint and the run that continues it have different reference networks."""
    if (saved and saved.fingerprint) != (current and current.fingerprint):
        names = [f"{record.path} ({record.fingerprint})" if record else "no network" for record in (saved, current)]
        raise InputError(
            f"--ckpt_path is of a run whose objective has {names[0]} as its reference, but this run has {names[1]}: "
            f"set model.objective and its reference as before"
        )
