"""One scale of a batch of images: network step, guidance, draw, residual pyramid.

Everything here stays on the device: the host neither waits for it nor sends it anything, so a scale can be captured as
a CUDA graph.

Shapes: b images, n tokens of the scale, v vocabulary, c code dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mvar.devices import without_autocast
from lightning_mvar.models.mvar import MVAR, MVARState
from lightning_mvar.sampling.philox import NOISE, TOKENS, uniform
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer


class KnownTokens(NamedTuple):
    """Tokens of given images, and which of them to keep."""

    tokens: Tensor  # (b, l) int64
    keep: Tensor  # (b, l) bool


class Batch(NamedTuple):
    """Images to draw, on the device."""

    labels: Tensor  # (b,) int64
    keys: Tensor  # (b, 2) int64, of their random numbers
    known: KnownTokens | None


class Step(NamedTuple):
    """One drawn scale of a batch of images."""

    tokens: Tensor  # (b, n) int64
    f_hat: Tensor  # (b, c, s, t), this scale included


class Progress(NamedTuple):
    """What a batch carries from one scale to the next."""

    state: MVARState  # of 2 b images with guidance: of the labels, then unconditional
    inputs: Tensor | None  # (b or 2 b, n, c) of the next scale; None before the first
    f_hat: Tensor  # (b, c, s, t)
    uniforms: Tensor  # (b, l) float32 in [0, 1): one number per token


@dataclass(frozen=True)
class ScaleDrawer:
    """Draws batches scale by scale with a network, the quantizer of its tokenizer, and sampling settings."""

    model: MVAR
    quantizer: ResidualQuantizer
    settings: SamplingSettings

    @property
    def by_token(self) -> bool:
        return self.model.config.prediction == "token"

    @property
    def guided(self) -> bool:
        return self.settings.guidance > 0

    @torch.no_grad()
    def steps(self, batch: Batch) -> Iterator[Step]:
        """Draws all scales, coarse to fine."""
        progress = self.begin(batch)
        for k in range(self.model.config.schedule.num_scales):
            step, progress = self.draw_scale(k, batch, progress)
            yield step

    def begin(self, batch: Batch) -> Progress:
        """Prepares the first scale."""
        labels, config = batch.labels, self.model.config
        uniforms = uniform(batch.keys, 0, config.schedule.num_tokens, TOKENS)
        if self.guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        return Progress(self.model.init_state(labels), None, self.quantizer.empty(len(batch.labels)), uniforms)

    def draw_scale(self, k: int, batch: Batch, progress: Progress) -> tuple[Step, Progress]:
        """Draws scale `k`, continuing where `progress` ends. An enclosing autocast applies to the network alone."""
        schedule, (state, inputs, f_hat, uniforms) = self.model.config.schedule, progress
        drawn = []  # (tokens, codes) of each step of this scale
        n = 1 if self.by_token else schedule.lengths[k]
        for begin in range(schedule.offsets[k], schedule.offsets[k] + schedule.lengths[k], n):
            logits, state = self.model.step(inputs, state)
            with without_autocast(logits):
                tokens, codes = self.choose(self.guide(logits, k), k, slice(begin, begin + n), batch, uniforms)
            drawn.append((tokens, codes))
            inputs = self.for_network(codes)
        tokens, codes = (torch.cat(parts, dim=1) for parts in zip(*drawn, strict=True))
        with without_autocast(codes):
            f_hat = self.quantizer.accumulate(f_hat, codes, k)
        if not self.by_token and k + 1 < schedule.num_scales:
            inputs = self.for_network(self.quantizer.downsample(f_hat, k + 1))
        return Step(tokens, f_hat), Progress(state, inputs, f_hat, uniforms)

    def guide(self, logits: Tensor, k: int) -> Tensor:
        """Applies guidance to logits (b or 2 b, n, v); returns (b, n, v)."""
        if not self.guided:
            return logits
        strength = self.settings.guidance * (1 if self.by_token else self.model.config.schedule.ratio(k))
        conditional, unconditional = logits.chunk(2)
        return (1 + strength) * conditional - strength * unconditional

    def for_network(self, inputs: Tensor) -> Tensor:
        """Repeats inputs (b, n, c) for the unconditional half of the network's batch."""
        return inputs.repeat(2, 1, 1) if self.guided else inputs

    def choose(self, logits: Tensor, k: int, span: slice, batch: Batch, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens (b, n) of logits (b, n, v) at the positions `span`, and their codes (b, n, c)."""
        tokens = draw(logits, uniforms[:, span], self.settings)
        codes = self.quantizer.codebook(tokens)
        if self.settings.smooth:
            positions = torch.arange(span.start, span.stop, device=tokens.device)[:, None]
            noise = uniform(batch.keys, positions, logits.shape[-1], NOISE)
            weights = gumbel_mixture(logits, noise, self.model.config.schedule.ratio(k), self.settings)
            codes = weights @ self.quantizer.codebook.weight
        if batch.known is not None:
            keep = batch.known.keep[:, span]
            tokens = torch.where(keep, batch.known.tokens[:, span], tokens)
            codes = torch.where(keep[..., None], self.quantizer.codebook(tokens), codes)
        return tokens, codes


def truncate(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Applies top-k, then top-p, each skipped if 0, as in VAR's `sample_with_top_k_top_p_`.

    Returns probabilities (b, n, k), 0 if excluded, and tokens (b, n, k), most likely first.
    """
    size = logits.shape[-1]
    logits, tokens = logits.topk(min(top_k, size) if top_k else size, dim=-1)
    probabilities = logits.softmax(dim=-1)
    if top_p == 0:
        return probabilities, tokens
    preceding = probabilities.cumsum(dim=-1) - probabilities
    outside = preceding >= top_p
    outside[..., 0] = False
    return probabilities.masked_fill(outside, 0), tokens


def draw(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """Draws tokens (b, n) int64 from logits (b, n, v) by inverting the CDF at `uniforms` (b, n) in [0, 1)."""
    probabilities, tokens = truncate(logits, settings.top_k, settings.top_p)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniforms[..., None] * cumulative[..., -1:]
    # The first token that reaches the target: never one of probability 0.
    choice = torch.searchsorted(cumulative, target)
    choice = choice.clamp(max=tokens.shape[-1] - 1)  # NaN logits must not raise an index error
    return tokens.gather(-1, choice)[..., 0]


def gumbel_mixture(logits: Tensor, uniforms: Tensor, ratio: float, settings: SamplingSettings) -> Tensor:
    """Returns Gumbel-softmax weights (b, n, v), noise from `uniforms` (b, n, v); the temperature falls with `ratio`."""
    probabilities, tokens = truncate(logits, settings.top_k, settings.top_p)
    kept = torch.zeros_like(logits).scatter(-1, tokens, probabilities) > 0
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    gumbel = -torch.log(-torch.log(uniforms.clamp(1e-9, 1 - 1e-7)))
    noisy = (logits * (1 + ratio)).masked_fill(~kept, -torch.inf) + gumbel
    return (noisy / temperature).softmax(dim=-1)
