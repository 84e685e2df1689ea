"""Losses after prefixes drawn by the network itself, which measure exposure bias during training.

Teacher forcing shows the network true prefixes; sampling shows it its own draws. The true tokens are no target for a
loss after own draws, because they complete another prefix. As in bitwise self-correction (Infinity, arXiv 2412.04431),
the target instead corrects the draws: see `ResidualQuantizer.repairing_tokens`.

Even a perfect network has a higher loss after own draws, because the target then depends on how the true image differs
from them. The more scales are drawn, the less of the true image is known: if all are drawn, the demo's network has a
higher loss than a uniform guess. Therefore true scales precede the drawn ones (one by default), and the loss serves
only to compare runs and checkpoints. The change in entropy needs no target: for a perfect network, whose draws follow
the distribution of the data, it is 0 for any number of drawn scales.

Shapes: b images, n tokens of a scale, l of all, v vocabulary, c code dim, s x t last token map, k scales.
"""

from __future__ import annotations

from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.devices import without_autocast
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.models.mvar import MVAR, MVARState
from lightning_mvar.sampling.generate import max_batch_size
from lightning_mvar.sampling.philox import TOKENS, image_keys, uniform
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import draw
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer
from lightning_mvar.training.collectives import sum_over_ranks
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.strategies import sampling_mode


class OwnPrefixCallback(L.Callback):
    """Logs the network's loss after its own draws at each validation; see the module for how to read it.

    `val_own_prefix/K` is the loss of the scale named K, in nats per token, after a prefix whose last `own_scales`
    scales (fewer at coarse scales) are drawn by the network and whose other scales are true. `val_true_prefix/K` is the
    teacher-forced loss of the same images. `val_entropy_shift/K` is the entropy of the prediction after own draws minus
    that after true scales. Each has a mean over all tokens, `.../mean`. The first scale has no prefix.

    Tokens are drawn without guidance or truncation, with the weights being trained, as scored by `val_scale_loss/K`.
    The draws of an image depend only on the seed and the image. Costs `own_scales` + 1 forward passes per image.

    Args:
        images: number of images, from the start of the validation shards.
        own_scales: number of drawn scales right before each scored scale.
        seed: random seed of the draws; the same at each validation.
        keep_sharded: gather a sharded network block by block, if it does not fit on one device as a whole; slower.
    """

    def __init__(self, images: int = 256, own_scales: int = 1, seed: int = 0, keep_sharded: bool = False) -> None:
        require_in("[1, inf)", "OwnPrefixCallback's ", images=images, own_scales=own_scales)
        self.images, self.own_scales, self.keep_sharded = images, own_scales, keep_sharded
        self.seed = SamplingSettings(seed=seed).seed
        self.sums: Tensor | None = None  # (3, k - 1) float64 of this rank's images
        self.count: Tensor | None = None  # () number of those images

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(pl_module)

    def check(self, pl_module: L.LightningModule) -> None:
        """Checks that the data are token shards and the network predicts scales.

        Not called by `setup`, because the module does not know yet whether the run continues from a checkpoint.

        Raises:
            InputError: if either is not the case.
        """
        assert isinstance(pl_module, LitMVAR)
        if pl_module.token_data is None:
            raise InputError("OwnPrefixCallback needs the image numbers of token shards: use TokenDataModule")
        if pl_module.network_config.prediction == "token":
            raise InputError("OwnPrefixCallback needs a network that predicts scales, not single tokens")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.sums = self.count = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: TokenBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Scores a batch; all ranks score the same number of batches, because a sharded network needs all ranks."""
        assert isinstance(pl_module, LitMVAR)
        if trainer.sanity_checking or batch_idx * pl_module.batch_of_all_ranks >= self.images:
            return
        part_size = max(1, 2 * max_batch_size(pl_module.network_config) // (self.own_scales + 1))
        quantizer, scored = pl_module.tokenizer.quantizer, []
        with sampling_mode(pl_module.network, trainer.strategy, self.keep_sharded) as network:
            parts = (tensor.split(part_size) for tensor in (batch.tokens, batch.labels, batch.ids))
            for tokens, labels, ids in zip(*parts, strict=True):
                keys = image_keys(self.seed, ids.tolist()).to(tokens.device)
                scored.append(score_own_prefixes(network, quantizer, tokens, labels, keys, self.own_scales))
        counted = batch.valid & (batch.ids < self.images)
        sums = torch.cat(scored).double().mul(counted[:, None, None]).sum(dim=0)
        self.sums = sums if self.sums is None else self.sums + sums
        self.count = counted.sum() if self.count is None else self.count + counted.sum()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.sums is None or self.count is None:
            return
        assert isinstance(pl_module, LitMVAR)
        schedule = pl_module.network_config.schedule
        means = sum_over_ranks(self.sums) / sum_over_ranks(self.count)  # (3, k - 1)
        lengths = means.new_tensor(schedule.lengths[1:])
        for tag, row in zip(("val_own_prefix", "val_true_prefix", "val_entropy_shift"), means, strict=True):
            named = dict(zip(schedule.names[1:], row, strict=True)) | {"mean": (row * lengths).sum() / lengths.sum()}
            pl_module.log_dict({f"{tag}/{name}": value.float() for name, value in named.items()})


class Prefix(NamedTuple):
    """Scales before the current one, of which the network has drawn the last few."""

    f_hat: Tensor  # (b, c, s, t)
    state: MVARState


@torch.no_grad()
def score_own_prefixes(
    network: MVAR, quantizer: ResidualQuantizer, tokens: Tensor, labels: Tensor, keys: Tensor, own_scales: int
) -> Tensor:
    """Scores each scale but the first after prefixes that end with scales drawn by the network.

    Args:
        network: in eval mode; predicts scales.
        quantizer: that of its tokenizer.
        tokens: (b, l) int64 of true images.
        labels: (b,) int64.
        keys: (b, 2) int64 of the images' random numbers.
        own_scales: number of drawn scales at the end of a prefix; fewer if it is shorter.

    Returns:
        (b, 3, k - 1) float32, means over the tokens of each scale: cross entropy after own draws, cross entropy after
        true scales, entropy after own draws minus that after true scales.
    """
    schedule, settings = network.config.schedule, SamplingSettings(guidance=0, top_k=0, top_p=0)
    uniforms = uniform(keys, 0, schedule.num_tokens, TOKENS).split(schedule.lengths, dim=1)
    prefixes = [Prefix(quantizer.empty(len(tokens)), network.init_state(labels))]  # of 0, 1, ... drawn scales
    scores = []
    for k, true in enumerate(tokens.split(schedule.lengths, dim=1)):
        losses, entropies, continued, true_f_hat = [], [], [], prefixes[0].f_hat
        for f_hat, state in prefixes:
            logits, state = network.step(quantizer.downsample(f_hat, k) if k else None, state)  # (b, n, v)
            with without_autocast(logits):
                targets = quantizer.repairing_tokens(true, true_f_hat, f_hat, k)
                loss, entropy = loss_and_entropy(logits, targets)
                continued.append((f_hat, draw(logits, uniforms[k], settings), state))
            losses.append(loss)
            entropies.append(entropy)
        if k > 0:
            scores.append(torch.stack([losses[-1], losses[0], entropies[-1] - entropies[0]], dim=1))  # (b, 3)
        continued = [(true_f_hat, true, continued[0][2]), *continued][: own_scales + 1]
        with without_autocast(true):
            prefixes = [Prefix(quantizer.accumulate(f, quantizer.codebook(t), k), state) for f, t, state in continued]
    return torch.stack(scores, dim=2)


def loss_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cross entropy and entropy (b,) in nats per token of logits (b, n, v) and targets (b, n)."""
    logs = logits.log_softmax(dim=-1)
    losses, entropies = -logs.gather(-1, targets[..., None])[..., 0], -(logs.exp() * logs).sum(dim=-1)
    return losses.mean(dim=1), entropies.mean(dim=1)
