"""What training minimizes: one class per objective, chosen by `model.objective`.

| objective                | inputs            | targets                     | source                              |
|--------------------------|-------------------|-----------------------------|-------------------------------------|
| `TeacherForced`          | the image's codes | the image's tokens          | VAR, arXiv 2404.02905, section 3.2  |
| `SelfCorrecting`         | corrupted codes   | tokens that repair them     | Infinity, arXiv 2412.04431          |

Shapes: b images, l tokens of all scales, n tokens of a scale, v vocabulary, c code dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_mvar.data.tokens.stream import TokenBatch
from lightning_mvar.devices import exact_float32, without_autocast
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.sampling.philox import TOKENS, uniform
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.corruption import Neighbours, corrupt
from lightning_mvar.tokenizer.tokenizer import Tokenizer

Replacement = Callable[[Tensor, slice], Tensor]  # (targets (b, n) of a scale, its positions) -> tokens (b, n)
CHOICE, REPLACEMENT, SHARE = range(3)  # rows of the random numbers of an image


class Scores(NamedTuple):
    """The result of an objective on a batch: what to minimize, and what to log."""

    loss: Tensor  # () float32
    losses: Tensor  # (b, l) cross entropy in nats
    correct: Tensor  # (b, l) float32, whether the most likely token is the target
    scalars: dict[str, Tensor]  # () each, logged as train/NAME


class Learner(Protocol):
    """What an objective needs of the module that it trains, `LitMVAR`."""

    network: MVAR

    @property
    def network_config(self) -> MVARConfig: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def teacher_inputs(self, tokens: Tensor) -> Tensor: ...

    def score(self, batch: TokenBatch, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]: ...

    def image_keys(self, batch: TokenBatch, batch_idx: int, purpose: str) -> Tensor: ...


class Objective(ABC):
    """What to minimize. Validation always reports the teacher-forced cross entropy, so runs can be compared."""

    def check(self, network: MVARConfig) -> None:  # noqa: B027 (most objectives train any network)
        """Raises InputError unless a network of this configuration can be trained by it."""

    @abstractmethod
    def __call__(self, learner: Learner, batch: TokenBatch, labels: Tensor, batch_idx: int) -> Scores:
        """Computes the loss of this rank's part of a batch.

        Args:
            learner: the module being trained.
            batch: the images, on the device.
            labels: (b,) int64 their labels, some replaced by the unconditional class.
            batch_idx: number of the batch in the epoch.
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
        if not 0 <= label_smoothing < 1:
            raise InputError(f"objective.label_smoothing must be in [0, 1), got {label_smoothing}")
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

    In each image, a random share of the tokens of all scales but the last is replaced. The network reads the pyramid of
    the replaced tokens, and its targets are the tokens that a tokenizer would choose at each scale, given that pyramid.
    See `corrupt`. So it learns to continue from its own errors, which teacher forcing never shows it.

    Args:
        max_share: largest share of tokens to replace; each image draws its own, uniform in [0, max_share].
        replacement: `neighbours` draws among the codes nearest to the token's own; `own` draws from the network's
            prediction given the true coarser scales, at the cost of a forward pass.
        neighbours: number of nearest codes to draw from.
        temperature: draw neighbours with probabilities proportional to exp(-d / temperature), d their squared distance
            relative to that of the nearest neighbour, averaged over all codes; null draws them evenly.
        loss_weights: see `TeacherForced`.
        label_smoothing: see `TeacherForced`.
    """

    def __init__(
        self,
        max_share: float = 0.3,
        replacement: Literal["neighbours", "own"] = "neighbours",
        neighbours: int = 16,
        temperature: float | None = None,
        loss_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(loss_weights, label_smoothing)
        if not 0 <= max_share <= 1:
            raise InputError(f"objective.max_share must be in [0, 1], got {max_share}")
        if neighbours < 1:
            raise InputError(f"objective.neighbours must be at least 1, got {neighbours}")
        if temperature is not None and temperature <= 0:
            raise InputError(f"objective.temperature must be positive, got {temperature}")
        self.max_share, self.replacement = max_share, replacement
        self.num_neighbours, self.temperature = neighbours, temperature
        self.neighbours: Neighbours | None = None  # of the codebook, once its device is known

    def check(self, network: MVARConfig) -> None:
        super().check(network)
        if network.prediction != "scale":
            raise InputError("the objective SelfCorrecting needs a network that predicts scales, not single tokens")
        if self.replacement == "neighbours" and self.num_neighbours >= network.vocab_size:
            raise InputError(
                f"objective.neighbours is {self.num_neighbours}, but a code has only {network.vocab_size - 1} others"
            )

    def __call__(self, learner: Learner, batch: TokenBatch, labels: Tensor, batch_idx: int) -> Scores:
        keys = learner.image_keys(batch, batch_idx, "self-correction")
        rows = torch.arange(3, device=keys.device)[:, None]
        draws = uniform(keys, rows, batch.tokens.shape[1], TOKENS)  # (b, 3, l)
        with torch.no_grad():
            replaced = draws[:, CHOICE] < self.max_share * draws[:, SHARE, :1]  # (b, l)
            draw = self.draw_own if self.replacement == "own" else self.draw_neighbours
            others = draw(learner, batch, labels, draws[:, REPLACEMENT])

            def replace(targets: Tensor, span: slice) -> Tensor:
                return torch.where(replaced[:, span], others(targets, span), targets)

            with without_autocast(keys), exact_float32():  # as in sampling
                corrupted = corrupt(learner.tokenizer.quantizer, batch.tokens, replace)
        losses, correct = learner.network.score(labels, corrupted.inputs, corrupted.targets, self.label_smoothing)
        repaired = (corrupted.targets != batch.tokens).float().mean()
        schedule = learner.network_config.schedule
        return Scores(self.mean(losses, schedule), losses, correct, {"repaired": repaired})

    def draw_neighbours(self, learner: Learner, batch: TokenBatch, labels: Tensor, uniforms: Tensor) -> Replacement:
        codebook = learner.tokenizer.quantizer.codebook.weight
        if self.neighbours is None or self.neighbours.codes.device != codebook.device:
            self.neighbours = Neighbours.of(codebook, self.num_neighbours, self.temperature)
        table = self.neighbours
        return lambda targets, span: table.draw(targets, uniforms[:, span])

    def draw_own(self, learner: Learner, batch: TokenBatch, labels: Tensor, uniforms: Tensor) -> Replacement:
        learner.network.eval()  # without drop path
        drawn = learner.network.redraw(labels, learner.teacher_inputs(batch.tokens), uniforms)  # (b, l)
        learner.network.train()
        return lambda targets, span: drawn[:, span]
