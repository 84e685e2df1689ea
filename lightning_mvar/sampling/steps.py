"""One scale of a batch of images: network step, guidance, draw, residual pyramid.

Everything here stays on the device, without synchronization or copies from the host, so a scale can be captured as a
CUDA graph.

Shapes: b images, n tokens of the scale, v vocabulary, c code dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mvar.devices import without_autocast
from lightning_mvar.models.mvar import MVAR, MVARState
from lightning_mvar.sampling.drafts import choose_by_score
from lightning_mvar.sampling.guidance import replace_codes, sharpen, unconditional_like
from lightning_mvar.sampling.philox import NOISE, TOKENS, uniform
from lightning_mvar.sampling.scorer import Scorer
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer


class KnownTokens(NamedTuple):
    """Tokens of given images, and which of them to keep."""

    tokens: Tensor  # (b, l) int64
    keep: Tensor  # (b, l) bool


class BatchInputs(NamedTuple):
    """Inputs of a batch of images to draw, on the device."""

    labels: Tensor  # (b,) int64, or (b, num_classes + 1) float weights of mixed classes
    keys: Tensor  # (b, 2) int64 keys of the random streams
    known: KnownTokens | None


class Step(NamedTuple):
    """One drawn scale of a batch of images."""

    tokens: Tensor  # (b, n) int64
    f_hat: Tensor  # (b, c, s, t), this scale included


class States(NamedTuple):
    """States of the network and of the guiding network, if any."""

    network: MVARState  # of b images, or 2 b if the second half guides the first
    guide: MVARState | None


class Progress(NamedTuple):
    """State of a batch between two scales."""

    states: States
    inputs: Tensor | None  # (b, n, c) of the next scale, or (2 b, n, c) if the guide's differ; None before the first
    f_hat: Tensor  # (b, c, s, t), or (2 b, c, s, t) if the guide's differ
    uniforms: Tensor  # (b, l) float32 in [0, 1): one number per token
    logits: Tensor | None  # (b, m, v) of the previous scale, if the next one needs them

    def without_guide(self) -> Progress:
        count = len(self.uniforms)
        states = States(self.states.network.first(count), None)
        inputs = None if self.inputs is None else self.inputs[:count]
        return self._replace(states=states, inputs=inputs, f_hat=self.f_hat[:count])


@dataclass(frozen=True)
class ScaleDrawer:
    """Draws batches scale by scale with a network, the quantizer of its tokenizer, sampling settings and a guide.

    Without a guiding network, the network guides itself: the guide is a second half of its batch.
    """

    model: MVAR
    quantizer: ResidualQuantizer
    settings: SamplingSettings
    guide: MVAR | None = None
    scorer: Scorer | None = None  # of drafts

    @property
    def by_token(self) -> bool:
        return self.model.config.prediction == "token"

    @cached_property
    def strengths(self) -> tuple[float, ...]:
        """Guidance strength of each scale."""
        return self.settings.guide.strengths(self.model.config)

    @cached_property
    def num_guided_scales(self) -> int:
        return self.settings.guide.num_guided_scales(self.model.config)

    def is_guided(self, k: int) -> bool:
        """Returns whether the guide runs at scale `k`."""
        return k < self.num_guided_scales

    @torch.no_grad()
    def steps(self, batch: BatchInputs) -> Iterator[Step]:
        """Draws all scales, coarse to fine."""
        progress = self.begin(batch)
        for k in range(self.model.config.schedule.num_scales):
            step, progress = self.draw_scale(k, batch, progress)
            yield step

    def begin(self, batch: BatchInputs) -> Progress:
        """Prepares the first scale."""
        labels, config, guide = batch.labels, self.model.config, None
        uniforms = uniform(batch.keys, 0, config.schedule.num_tokens, TOKENS)
        f_hat = self.quantizer.empty(len(labels))
        if self.is_guided(0) and self.guide is not None:
            guide = self.guide.init_state(labels)
        elif self.is_guided(0) and self.settings.guide.corrupt:
            labels, f_hat = torch.cat([labels, labels]), f_hat.repeat(2, 1, 1, 1)
        elif self.is_guided(0):
            labels = torch.cat([labels, unconditional_like(labels, config.num_classes)])
        return Progress(States(self.model.init_state(labels), guide), None, f_hat, uniforms, None)

    def draw_scale(self, k: int, batch: BatchInputs, progress: Progress) -> tuple[Step, Progress]:
        """Draws scale `k`, continuing from `progress`. An enclosing autocast applies to the network only."""
        schedule = self.model.config.schedule
        progress = progress if self.is_guided(k) else progress.without_guide()
        drawn = []  # (tokens, codes) of each span of this scale
        n = 1 if self.by_token else schedule.lengths[k]
        for begin in range(schedule.offsets[k], schedule.offsets[k] + schedule.lengths[k], n):
            span = slice(begin, begin + n)
            tokens, codes, logits, states = self.draw_span(k, span, batch, progress)
            with without_autocast(codes):
                codes = self.append_guide_codes(codes, k, span, batch)
            progress = progress._replace(states=states, inputs=codes)
            drawn.append((tokens, codes))
        tokens, codes = (torch.cat(parts, dim=1) for parts in zip(*drawn, strict=True))
        with without_autocast(codes):
            f_hat = self.quantizer.accumulate(progress.f_hat, codes, k)
        if not self.by_token and k + 1 < schedule.num_scales:
            progress = progress._replace(inputs=self.quantizer.downsample(f_hat, k + 1))
        before = logits if self.settings.guide.beta else None
        return Step(tokens, f_hat[: len(tokens)]), progress._replace(f_hat=f_hat, logits=before)

    def draw_span(
        self, k: int, span: slice, batch: BatchInputs, progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor, States]:
        """Draws the tokens at the positions `span`.

        Returns:
            Tokens (b, n), their codes (b, n, c), guided logits (b, n, v) and the states after them. Where logits are
            not finite, codes become NaN, and so do the features and the image.
        """
        guided, states = self.predict(k, progress.inputs, progress.states)
        with without_autocast(guided):
            logits = self.adjust(guided, k, progress.logits)
            if self.scorer is not None and self.settings.choice.include(k):
                tokens = self.choose_draft(self.scorer, logits, k, span, batch, progress)
                codes = self.quantizer.codebook(tokens)
            else:
                tokens, codes = self.choose(logits, k, span, batch, progress.uniforms)
            broken = ~guided.sum(dim=-1, keepdim=True, dtype=torch.float32).isfinite()
            codes = codes.masked_fill(broken, torch.nan)  # otherwise an overflow would look like any other token
            if batch.known is not None:
                keep = batch.known.keep[:, span]
                tokens = torch.where(keep, batch.known.tokens[:, span], tokens)
                codes = torch.where(keep[..., None], self.quantizer.codebook(tokens), codes)
        return tokens, codes, guided, states

    def predict(self, k: int, inputs: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Runs network and guide on the inputs of scale `k`; returns guided logits (b, n, v) and the new states."""
        shared, rows = inputs, len(states.network.cond)  # shared by network and guide
        if inputs is not None and len(inputs) < rows:
            inputs = inputs.repeat(2, 1, 1)
        logits, network = self.model.step(inputs, states.network)
        if not self.is_guided(k):
            return logits, States(network, None)
        if self.guide is None:
            (logits, weaker), guide = logits.chunk(2), None
        else:
            assert states.guide is not None
            weaker, guide = self.guide.step(shared, states.guide)
        strength = self.strengths[k]
        return (1 + strength) * logits - strength * weaker, States(network, guide)

    def adjust(self, logits: Tensor, k: int, before: Tensor | None) -> Tensor:
        """Sharpens guided logits (b, n, v) against those of the previous scale and divides them by the temperature."""
        if before is not None:
            shapes = self.model.config.schedule.shapes
            logits = sharpen(logits, before, shapes[k], shapes[k - 1], self.settings.guide.beta)
        temperature = self.settings.temperature_of(k)
        return logits if temperature == 1 else logits / temperature

    def append_guide_codes(self, codes: Tensor, k: int, span: slice, batch: BatchInputs) -> Tensor:
        """Appends the guide's codes (b, n, c) to the codes (b, n, c) of the images, if they differ."""
        share = self.settings.guide.corrupt
        if share == 0 or not self.is_guided(k):
            return codes
        return torch.cat([codes, replace_codes(codes, share, batch.keys, span, self.quantizer.codebook.weight)])

    def choose(
        self, logits: Tensor, k: int, span: slice, batch: BatchInputs, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draws tokens (b, n) from logits (b, n, v) at the positions `span`; returns them and their codes (b, n, c)."""
        tokens = draw(logits, uniforms[:, span], self.settings)
        codes = self.quantizer.codebook(tokens)
        if self.settings.smooth:
            positions = torch.arange(span.start, span.stop, device=tokens.device)[:, None]
            noise = uniform(batch.keys, positions, logits.shape[-1], NOISE)
            weights = gumbel_mixture(logits, noise, self.model.config.schedule.ratio(k), self.settings)
            codes = weights @ self.quantizer.codebook.weight
        return tokens, codes

    def choose_draft(
        self, scorer: Scorer, logits: Tensor, k: int, span: slice, batch: BatchInputs, progress: Progress
    ) -> Tensor:
        """Draws several candidates for all tokens of scale `k`; returns the tokens (b, n) of the chosen candidate."""
        drafts = self.settings.choice
        uniforms = drafts.uniforms(batch.keys, progress.uniforms[:, span], span)  # (b, n, m)
        tokens = draw(logits, uniforms, self.settings)  # (b, n, m)
        if batch.known is not None:
            keep, known = (part[:, span, None] for part in (batch.known.keep, batch.known.tokens))
            tokens = torch.where(keep, known, tokens)
        codes = self.quantizer.codebook(tokens.transpose(1, 2).flatten(0, 1))  # (b m, n, c)
        before = progress.f_hat[: len(tokens)].repeat_interleave(drafts.count, dim=0)  # (b m, c, s, t)
        labels = batch.labels.repeat_interleave(drafts.count)  # (b m,)
        scores = scorer(self.quantizer.accumulate(before, codes, k), labels, k).view(-1, drafts.count)  # (b, m)
        chosen = choose_by_score(scores, batch.keys, k)  # (b,)
        return tokens.take_along_dim(chosen[:, None, None], dim=2)[..., 0]


def truncate(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Applies top-k, then top-p, each skipped if 0, as in VAR's `sample_with_top_k_top_p_`.

    Returns:
        Probabilities (b, n, k), 0 if excluded, and tokens (b, n, k), most likely first.
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
    """Draws tokens int64 from logits (b, n, v) by inverting the CDF at `uniforms` in [0, 1).

    Tokens and `uniforms` have the shape (b, n), or (b, n, m) for m draws from the same logits.
    """
    probabilities, tokens = truncate(logits, settings.top_k, settings.top_p)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniforms.reshape(*logits.shape[:2], -1) * cumulative[..., -1:]
    # The first token that reaches the target never has probability 0.
    choice = torch.searchsorted(cumulative, target)
    choice = choice.clamp(max=tokens.shape[-1] - 1)  # NaN logits must not raise an index error
    return tokens.gather(-1, choice).view(uniforms.shape)


def gumbel_mixture(logits: Tensor, uniforms: Tensor, ratio: float, settings: SamplingSettings) -> Tensor:
    """Returns Gumbel-softmax weights (b, n, v), noise from `uniforms` (b, n, v); the temperature falls with `ratio`."""
    probabilities, tokens = truncate(logits, settings.top_k, settings.top_p)
    kept = torch.zeros_like(logits).scatter(-1, tokens, probabilities) > 0
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    gumbel = -torch.log(-torch.log(uniforms.clamp(1e-9, 1 - 1e-7)))
    noisy = (logits * (1 + ratio)).masked_fill(~kept, -torch.inf) + gumbel
    return (noisy / temperature).softmax(dim=-1)
