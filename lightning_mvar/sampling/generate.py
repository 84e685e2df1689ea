"""Sampling of images, scale by scale (VAR, arXiv 2404.02905, section 3.2; guidance as in its code).

The network's state is carried from scale to scale: no prefix is ever run again. Each token of an image consumes one
uniform number of that image's generator, so with one generator per image the batch affects the result only by rounding
(docs/devices.md has figures).

Shapes: b images, n tokens of the scale, v vocabulary, c code dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lightning_mvar.checkpoints.pair import check_pair
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR, MVARState
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer


class Step(NamedTuple):
    """One drawn scale of a batch of images."""

    tokens: Tensor  # (b, n) int64
    f_hat: Tensor  # (b, c, s, s), this scale included


class KnownTokens(NamedTuple):
    """Tokens of given images, and which of them to keep."""

    tokens: Tensor  # (b, l) int64
    keep: Tensor  # (b, l) bool


@overload
def generate(
    model: MVAR, tokenizer: Tokenizer, labels: Tensor, *, return_tokens: Literal[False] = False, **settings: Any
) -> Tensor: ...


@overload
def generate(
    model: MVAR, tokenizer: Tokenizer, labels: Tensor, *, return_tokens: Literal[True], **settings: Any
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()  # type: ignore[misc]  # not inference_mode: FSDP2 reuses the buffers gathered here in training
def generate(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    *,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    generator: Generator | Sequence[Generator] | None = None,
    known: KnownTokens | None = None,
    return_tokens: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples one image per label. The defaults are those of the papers' scores.

    Args:
        model: in eval mode, on the device to sample on.
        tokenizer: in eval mode, on the same device.
        labels: (b,) integer classes in [0, num_classes]; `num_classes` means unconditional.
        guidance: classifier-free guidance scale at the finest scale, growing from 0 at the coarsest; 0 for none. A
            network that predicts single tokens uses it for every token, like LlamaGen (arXiv 2406.06525).
        top_k: sample from the k most likely tokens; 0, or more than the vocabulary has, for all.
        top_p: then from the fewest tokens whose probabilities sum to p; 0 or 1 for all.
        smooth: mix codes by a Gumbel-softmax instead of drawing one: smoother images to look at, never for scores.
        generator: CPU generator, one for all images or one per image; None for torch's default generator.
        known: tokens of given images, and which of them to keep; the others are drawn conditioned on those.
        return_tokens: also return the tokens.

    Returns:
        Images (b, 3, H, W) in [0, 1], and with `return_tokens` the tokens (b, l) int64.

    Raises:
        InputError: if the tokenizer does not fit the model, or an argument is out of range.
    """
    settings = SamplingSettings(guidance, top_k, top_p, smooth)
    images, tokens = draw_images(model, tokenizer, labels, settings, generator, known)
    return (images, tokens) if return_tokens else images


@torch.no_grad()
def draw_images(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    settings: SamplingSettings,
    generator: Generator | Sequence[Generator] | None = None,
    known: KnownTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws images (b, 3, H, W) in [0, 1] and their tokens (b, l) int64; see `generate`."""
    drawn = []
    for step in draw_scales(model, tokenizer, labels, settings, generator, known):
        drawn.append(step.tokens)
    return decode_images(tokenizer, step.f_hat), torch.cat(drawn, dim=1)


@torch.no_grad()
def decode_images(tokenizer: Tokenizer, f_hat: Tensor) -> Tensor:
    """Decodes f_hat (b, c, s, s) of any scale to images (b, 3, H, W) in [0, 1]."""
    return (tokenizer.decode_features(f_hat).clamp(-1, 1) + 1) / 2


@torch.no_grad()
def draw_scales(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    settings: SamplingSettings,
    generator: Generator | Sequence[Generator] | None = None,
    known: KnownTokens | None = None,
) -> Iterator[Step]:
    """Draws scale by scale, coarse to fine; see `generate` for the arguments.

    Raises:
        InputError: if the tokenizer does not fit the model, or an argument is out of range.
    """
    check_arguments(model, tokenizer, labels, generator)
    labels = labels.long()
    check_known(known, len(labels), model.config.schedule.num_tokens)
    schedule, quantizer, device = model.config.schedule, tokenizer.quantizer, labels.device
    by_token = model.config.prediction == "token"
    guided = settings.guidance > 0
    guided_labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)]) if guided else labels
    state = model.init_state(guided_labels)
    inputs, f_hat = None, quantizer.empty(len(labels))
    for k, (offset, length) in enumerate(zip(schedule.offsets, schedule.lengths, strict=True)):
        drawn = []  # (tokens, codes) of each step of this scale
        n = 1 if by_token else length
        for begin in range(offset, offset + length, n):
            logits, state = model.step(inputs, state)
            if guided:
                conditional, unconditional = logits.chunk(2)
                strength = settings.guidance * (1 if by_token else schedule.ratio(k))
                logits = (1 + strength) * conditional - strength * unconditional
            tokens = draw(logits, uniform((len(labels), n), generator, device), settings)
            codes = quantizer.codebook(tokens)
            if settings.smooth:
                noise = uniform((len(labels), n, logits.shape[-1]), generator, device)
                codes = gumbel_mixture(logits, noise, schedule.ratio(k), settings) @ quantizer.codebook.weight
            if known is not None:
                span = slice(begin, begin + n)
                tokens = torch.where(known.keep[:, span], known.tokens[:, span], tokens)
                codes = torch.where(known.keep[:, span, None], quantizer.codebook(tokens), codes)
            drawn.append((tokens, codes))
            inputs = codes.repeat(2 if guided else 1, 1, 1)
        tokens, codes = (torch.cat(parts, dim=1) for parts in zip(*drawn, strict=True))
        f_hat = quantizer.accumulate(f_hat, codes, k)
        yield Step(tokens, f_hat)
        if not by_token and k + 1 < schedule.num_scales:
            inputs = quantizer.downsample(f_hat, k + 1).repeat(2 if guided else 1, 1, 1)


def teacher_inputs(network: MVARConfig, tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Returns the teacher-forcing inputs, equal to those of the sampling steps that draw the same tokens.

    Args:
        network: config of the network that takes the inputs.
        tokenizer: tokenizer of the tokens.
        tokens: (b, l) int64.

    Returns:
        (b, l - n, c) if the first step draws n tokens: per scale, f_hat of the scales before it, at its resolution; for
        a network that predicts single tokens, the code of the previous token.
    """
    if network.prediction == "token":
        return tokenizer.quantizer.codebook(tokens[:, :-1])
    return tokenizer.scale_inputs(tokens)


def kept_tokens_mask(schedule: ScaleSchedule, mask: Tensor) -> Tensor:
    """Returns which tokens (l,) bool to keep, given which pixels (H, W) bool to keep.

    A token is kept if more than half of its cell is. The token of a 1 x 1 scale, which sets the layout of the complete
    image, is kept if any pixel is.

    The masks of VAR's zero-shot editing are the same for a centred box of half the side. They differ in cells that an
    edge of the mask crosses: VAR interpolates the mask, reduced to the last scale, at the centre of each cell. And VAR
    keeps the token of the 1 x 1 scale even if no pixel is kept.
    """
    kept = []
    for shape in schedule.shapes:
        share = F.adaptive_avg_pool2d(mask[None, None].float(), shape).flatten()
        kept.append(share > (0.5 if len(share) > 1 else 0))
    return torch.cat(kept)


def compile_steps(network: MVAR) -> None:
    """Compiles one graph per scale with torch.compile; on CUDA, as CUDA graphs for a fixed batch size.

    Compiling takes minutes, once per batch size.

    Raises:
        InputError: if the network predicts single tokens, each of which would need a graph of its own.
    """
    if network.config.prediction == "token":
        raise InputError("--compile makes one graph per step: a network that predicts single tokens has too many steps")
    limit, scales = torch._dynamo.config.recompile_limit, network.config.schedule.num_scales
    torch._dynamo.config.recompile_limit = max(limit, 4 * scales)
    cuda = network.head.weight.is_cuda
    compiled = torch.compile(network.step, dynamic=False, mode="reduce-overhead" if cuda else "default")

    def step(scale_inputs: Tensor | None, state: MVARState) -> tuple[Tensor, MVARState]:
        if cuda and state.step == 0:
            torch.compiler.cudagraph_mark_step_begin()  # from here on, outputs for earlier batches may be overwritten
        return compiled(scale_inputs, state)

    network.step = step  # type: ignore[method-assign]


def uniform(shape: tuple[int, ...], generator: Generator | Sequence[Generator] | None, device: torch.device) -> Tensor:
    """Draws uniform numbers (b, ...) float32 in [0, 1), row i from generator i."""
    if generator is None or isinstance(generator, Generator):
        numbers = torch.rand(shape, generator=generator)
    else:
        numbers = torch.stack([torch.rand(shape[1:], generator=g) for g in generator])
    return numbers.to(device, non_blocking=True)  # the device may still compute the previous scale


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
    choice = torch.searchsorted(
        cumulative, target
    )  # the first token that reaches the target: never one of probability 0
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


def check_arguments(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    generator: Generator | Sequence[Generator] | None = None,
) -> None:
    check_pair(model.config, tokenizer.config, "tokenizer")
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    num_classes = model.config.num_classes
    is_valid = is_integer and labels.ndim == 1 and len(labels) > 0
    if not is_valid or labels.long().min() < 0 or labels.long().max() > num_classes:
        raise InputError(
            f"labels must be (b,) integers, classes in [0, {num_classes}], got {labels.dtype} {tuple(labels.shape)} "
            f"{labels.flatten()[:8].tolist()}"
        )
    if isinstance(generator, Sequence) and len(generator) != len(labels):
        raise InputError(f"{len(generator)} generators for {len(labels)} labels")


def check_known(known: KnownTokens | None, images: int, num_tokens: int) -> None:
    expected = (images, num_tokens)
    if known is not None and (known.tokens.shape != expected or known.keep.shape != expected):
        shapes = f"{tuple(known.tokens.shape)} and {tuple(known.keep.shape)}"
        raise InputError(f"known tokens and their keep mask must both be {expected}, got {shapes}")
