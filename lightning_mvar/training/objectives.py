"""Training objectives, selected by `model.objective`.

| objective                | inputs            | targets                     | source                              |
|--------------------------|-------------------|-----------------------------|-------------------------------------|
| `TeacherForced`          | the image's codes | the image's tokens          | VAR, arXiv 2404.02905, section 3.2  |
| `SelfCorrecting`         | corrupted codes   | tokens that repair them     | Infinity, arXiv 2412.04431          |
| `DirectDiscriminative`   | the image's codes | likelihood ratio, real above own samples | DDO, arXiv 2503.01103  |
| `ConditionContrastive`   | the image's codes | likelihood ratio, own label above others | CCA, arXiv 2410.09347  |

Shapes: b images, l tokens of all scales, n tokens of a scale, v vocabulary, c code dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.devices import exact_float32, without_autocast
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.sampling.philox import TOKENS, uniform
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.corruption import Neighbors, corrupt_pyramid
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.references import Reference

Replacement = Callable[[Tensor, slice], Tensor]  # (targets (b, n) of a scale, its positions) -> tokens (b, n)
CHOICE, REPLACEMENT, SHARE = range(3)  # rows of the random numbers of an image


class Scores(NamedTuple):
    """The result of an objective on a batch: the loss to minimize, and scores to log."""

    loss: Tensor  # () float32
    losses: Tensor  # (b, l) cross entropy in nats
    correct: Tensor  # (b, l) float32, 1 where the most likely token is the target
    scalars: dict[str, Tensor]  # () each, logged as train/NAME


def mean_scores(stage: str, losses: Tensor, correct: Tensor, schedule: ScaleSchedule) -> dict[str, Tensor]:
    """Returns means by tag: of scores (b, l) over all tokens and over the last scale, and of losses over each scale."""
    by_scale, last_correct = losses.split(schedule.lengths, dim=1), correct.split(schedule.lengths, dim=1)[-1]
    prefix = "scale_loss" if stage == "train" else f"{stage}_scale_loss"
    return {
        f"{stage}/loss": losses.mean(),
        f"{stage}/loss_last_scale": by_scale[-1].mean(),
        f"{stage}/acc": correct.mean(),
        f"{stage}/acc_last_scale": last_correct.mean(),
    } | {f"{prefix}/{name}": part.mean() for name, part in zip(schedule.names, by_scale, strict=True)}


class Learner(Protocol):
    """What an objective uses of the module that it trains, `LitMVAR`."""

    network: MVAR

    @property
    def network_config(self) -> MVARConfig: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def teacher_inputs(self, tokens: Tensor) -> Tensor: ...

    @property
    def reference(self) -> Reference | None: ...

    def score(self, batch: TokenBatch, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]: ...

    def image_keys(self, batch: TokenBatch, batch_idx: int, purpose: str) -> Tensor: ...


class Objective(ABC):
    """A loss to minimize. Validation always reports the teacher-forced cross entropy, so runs can be compared."""

    uses_own_samples = False  # whether half of each batch consists of the network's own samples
    uses_reference = False  # whether it compares the network to a frozen one
    reference: str | None = None  # path of the frozen network; None for the initial weights of the run

    def check(self, network: MVARConfig) -> None:  # noqa: B027 (most objectives train any network)
        """Raises InputError unless it can train a network with this configuration."""

    def check_own_samples(self, given: bool) -> None:
        """Raises InputError if it needs the network's own samples but none are given, or the reverse."""
        name = type(self).__name__
        if self.uses_own_samples and not given:
            raise InputError(
                f"the objective {name} needs --data.own: shards that `lightning-mvar sample --tokens` wrote"
            )
        if given and not self.uses_own_samples:
            raise InputError(f"the objective {name} does not use data.own: leave it out, or train on it as data.train")

    def reference_path(self, default: str | None) -> str | None:
        """Returns the path of the frozen network; None if it uses none. Raises InputError if no path is known."""
        if not self.uses_reference:
            return None
        if (path := self.reference or default) is None:
            name = type(self).__name__
            raise InputError(
                f"the objective {name} needs a reference network: set model.weights or model.objective.reference"
            )
        return path

    @abstractmethod
    def __call__(self, learner: Learner, batch: TokenBatch, labels: Tensor, batch_idx: int) -> Scores:
        """Computes the loss of this rank's part of a batch.

        Args:
            learner: the module being trained.
            batch: the images, on the device.
            labels: (b,) int64 labels of the images, some of them replaced by the unconditional class.
            batch_idx: index of the batch in the epoch.
        """


class TeacherForced(Objective):
    """Cross entropy of the image's tokens given its own coarser scales, averaged over all tokens.

    Args:
        loss_weights: weight of each scale's tokens, coarse to fine; only their ratios matter. Default: equal weights.
        label_smoothing: share of each target that is spread evenly over the vocabulary.
    """

    def __init__(self, loss_weights: list[float] | None = None, label_smoothing: float = 0.0) -> None:
        weights = loss_weights or [1.0]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
            raise InputError(f"objective.loss_weights must be at least 0 and not all 0, got {loss_weights}")
        require_in("[0, 1)", "objective.", label_smoothing=label_smoothing)
        self.loss_weights, self.label_smoothing = loss_weights, label_smoothing

    def check(self, network: MVARConfig) -> None:
        scales = network.schedule.num_scales
        if self.loss_weights is not None and len(self.loss_weights) != scales:
            raise InputError(
                f"objective.loss_weights has {len(self.loss_weights)} weights for {scales} scales; give one per scale"
            )

    def __call__(self, learner: Learner, batch: TokenBatch, labels: Tensor, batch_idx: int) -> Scores:
        losses, correct = learner.score(batch, labels, self.label_smoothing)
        return Scores(self.mean(losses, learner.network_config.schedule), losses, correct, {})

    def mean(self, losses: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Returns the weighted mean of losses (b, l) over all tokens."""
        if self.loss_weights is None:
            return losses.mean()
        total = sum(w * n for w, n in zip(self.loss_weights, schedule.lengths, strict=True))
        parts = zip(losses.split(schedule.lengths, dim=1), self.loss_weights, strict=True)
        return torch.stack([part.sum() * (weight / total) for part, weight in parts]).sum() / len(losses)


class SelfCorrecting(TeacherForced):
    """Cross entropy of tokens that repair a corrupted image (bitwise self-correction of Infinity, on code indices).

    In each image, a random share of the tokens of all scales but the last is replaced, see `corrupt_pyramid`. The
    network reads the pyramid of the replaced tokens, and its targets are the tokens that a tokenizer would choose at
    each scale, given that pyramid. It thus learns to continue from its own errors, which never occur in teacher
    forcing. Infinity's code draws a new share at each scale, the same for all images of a batch; here each image has
    one share for all its scales.

    Args:
        max_share: largest share of tokens to replace; each image draws its own share uniformly from [0, max_share].
        replacement: `neighbors` draws among the codes nearest to the token's own; `own` draws from the network's
            prediction given the true coarser scales, at the cost of a forward pass.
        neighbors: number of nearest codes to draw from.
        temperature: draw neighbors with probabilities proportional to exp(-d / temperature), where d is their squared
            distance relative to that of the nearest different code, averaged over all codes; null draws them evenly.
        loss_weights: see `TeacherForced`.
        label_smoothing: see `TeacherForced`.
    """

    def __init__(
        self,
        max_share: float = 0.3,
        replacement: Literal["neighbors", "own"] = "neighbors",
        neighbors: int = 16,
        temperature: float | None = None,
        loss_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(loss_weights, label_smoothing)
        require_in("[0, 1]", "objective.", max_share=max_share)
        require_in("[1, inf)", "objective.", neighbors=neighbors)
        require_in("(0, inf)", "objective.", temperature=temperature)
        self.max_share, self.replacement = max_share, replacement
        self.num_neighbors, self.temperature = neighbors, temperature
        self.neighbors: Neighbors | None = None  # of the codes in `codebook`, once its device is known
        self.codebook: Tensor | None = None

    def check(self, network: MVARConfig) -> None:
        super().check(network)
        if network.prediction != "scale":
            raise InputError("the objective SelfCorrecting needs a network that predicts scales, not single tokens")
        if self.replacement == "neighbors" and self.num_neighbors >= network.vocab_size:
            raise InputError(
                f"objective.neighbors is {self.num_neighbors}, but a code has only {network.vocab_size - 1} others"
            )

    def __call__(self, learner: Learner, batch: TokenBatch, labels: Tensor, batch_idx: int) -> Scores:
        keys = learner.image_keys(batch, batch_idx, "self-correction")
        rows = torch.arange(3, device=keys.device)[:, None]
        draws = uniform(keys, rows, batch.tokens.shape[1], TOKENS)  # (b, 3, l)
        with torch.no_grad():
            replaced = draws[:, CHOICE] < self.max_share * draws[:, SHARE, :1]  # (b, l)
            draw = self.draw_own if self.replacement == "own" else self.draw_neighbors
            others = draw(learner, batch, labels, draws[:, REPLACEMENT])

            def replace(targets: Tensor, span: slice) -> Tensor:
                return torch.where(replaced[:, span], others(targets, span), targets)

            with without_autocast(keys), exact_float32():  # as in sampling
                corrupted = corrupt_pyramid(learner.tokenizer.quantizer, batch.tokens, replace)
        losses, correct = learner.network.score(labels, corrupted.inputs, corrupted.targets, self.label_smoothing)
        repaired = (corrupted.targets != batch.tokens).float().mean()
        schedule = learner.network_config.schedule
        return Scores(self.mean(losses, schedule), losses, correct, {"repaired": repaired})

    def draw_neighbors(self, learner: Learner, batch: TokenBatch, labels: Tensor, uniforms: Tensor) -> Replacement:
        codebook = learner.tokenizer.quantizer.codebook.weight
        table = self.neighbors
        if table is None or self.codebook is not codebook or table.codes.device != codebook.device:
            table = Neighbors.find(codebook, self.num_neighbors, self.temperature)
            self.neighbors, self.codebook = table, codebook
        return lambda targets, span: table.draw(targets, uniforms[:, span])

    def draw_own(self, learner: Learner, batch: TokenBatch, labels: Tensor, uniforms: Tensor) -> Replacement:
        learner.network.eval()  # without drop path
        try:
            drawn = learner.network.redraw(labels, learner.teacher_inputs(batch.tokens), uniforms)  # (b, l)
        finally:
            learner.network.train()
        return lambda targets, span: drawn[:, span]


class DirectDiscriminative(Objective):
    """Makes real images more likely than under a frozen network, and its samples less likely (DDO, arXiv 2503.01103).

    This is the loss of a discriminator whose logit is beta * log(p / p_reference), on real images and on samples of the
    reference network: -log sigmoid(logit of a real image) - alpha * log sigmoid(-logit of an own sample), each averaged
    over its images.

    Args:
        reference: network that drew the samples: a checkpoint, a folder of `export` or a published file. Default:
            `model.weights`.
        alpha: weight of the own samples.
        beta: factor on the log ratio.
        per_token: average the log ratio over the tokens of an image, instead of summing it, so that beta does not
            depend on the resolution.
    """

    uses_own_samples, uses_reference = True, True

    def __init__(
        self, reference: str | None = None, alpha: float = 1.0, beta: float = 0.02, per_token: bool = False
    ) -> None:
        require_in("(0, inf)", "objective.", alpha=alpha, beta=beta)
        self.reference, self.alpha, self.beta, self.per_token = reference, alpha, beta, per_token

    def __call__(self, learner: Learner, batch: TokenBatch, labels: Tensor, batch_idx: int) -> Scores:
        if batch.own is None:
            raise InputError(
                "the objective DirectDiscriminative needs batches with own samples: TokenBatch.own is None"
            )
        losses, correct, ratios = log_ratios(learner, batch.tokens, labels, self.per_token)
        logits = self.beta * ratios  # (b,)
        own = batch.own.float()
        real_weight, own_weight = (part / part.sum().clamp(min=1) for part in (1 - own, own))  # (b,) each
        loss = -(real_weight * F.logsigmoid(logits) + self.alpha * own_weight * F.logsigmoid(-logits)).sum()
        separated = ((logits > 0) != batch.own).float().mean()
        scalars = {
            "logit_real": (real_weight * logits.detach()).sum(),
            "logit_own": (own_weight * logits.detach()).sum(),
            "separated": separated,
        }
        factors = (real_weight * len(own))[:, None]  # means over all rows are then means over the real images
        return Scores(loss, losses * factors, correct * factors, scalars)


class ConditionContrastive(Objective):
    """Makes each image more likely under its own label and less likely under others (CCA, arXiv 2410.09347).

    The network then needs less guidance, or none. With logit = beta * log(p / p_reference), the loss of an image is
    -log sigmoid(logit) for its own label plus -weight * log sigmoid(-logit) for another image's label; pairs of
    consecutive images exchange their labels. As in the published code, another label that is unconditional or equal by
    chance counts as the image's own, with weight 1, and the loss is divided by max(weight, 1).

    Args:
        reference: the frozen network: a checkpoint, a folder of `export` or a published file. Default: `model.weights`.
        beta: factor on the log ratio.
        weight: weight of other labels (lambda in the paper): 50 for its d16 of 310M parameters, up to 1,000 for d30.
        per_token: average the log ratio over the tokens of an image, instead of summing it.
    """

    uses_reference = True

    def __init__(
        self, reference: str | None = None, beta: float = 0.02, weight: float = 50.0, per_token: bool = False
    ) -> None:
        require_in("(0, inf)", "objective.", beta=beta, weight=weight)
        self.reference, self.beta, self.weight, self.per_token = reference, beta, weight, per_token

    def __call__(self, learner: Learner, batch: TokenBatch, labels: Tensor, batch_idx: int) -> Scores:
        b, unconditional = len(labels), learner.network_config.num_classes
        partner = torch.arange(b, device=labels.device) ^ 1
        exchanged = batch.labels[partner.where(partner < b, b - 1)]  # the last image of an odd number keeps its label
        others = torch.where(labels == unconditional, labels, exchanged)
        losses, correct, ratios = log_ratios(
            learner, batch.tokens.repeat(2, 1), torch.cat([labels, others]), self.per_token
        )
        logits, other_logits = (self.beta * ratios).chunk(2)  # (b,) each
        same = others == labels
        contrast = torch.where(same, F.logsigmoid(other_logits), self.weight * F.logsigmoid(-other_logits))
        loss = -(F.logsigmoid(logits) + contrast).mean() / max(self.weight, 1.0)
        scalars = {
            "logit_label": logits.detach().mean(),
            "logit_other": other_logits.detach().mean(),
            "separated": (logits > other_logits).float().mean(),
        }
        return Scores(loss, losses[:b], correct[:b], scalars)


def log_ratios(learner: Learner, tokens: Tensor, labels: Tensor, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns cross entropy (b, l), whether each prediction is correct (b, l), and log(p / p_reference) (b,)."""
    inputs = learner.teacher_inputs(tokens)
    assert learner.reference is not None  # see `Objective.reference_path`
    reference = learner.reference.score(labels, inputs, tokens)  # (b, l)
    losses, correct = learner.network.score(labels, inputs, tokens)
    gained = reference - losses  # (b, l) log ratio per token
    return losses, correct, gained.mean(dim=1) if per_token else gained.sum(dim=1)
