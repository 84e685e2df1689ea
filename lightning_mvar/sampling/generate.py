"""Drawing images from a network, scale by scale (VAR, arXiv 2404.02905, section 3.2; guidance as in its code).

The network's state is carried from scale to scale: no prefix is ever run again. Every token of an image takes one
uniform number from that image's generator, so with a generator per image the result does not depend on the batch.

Shapes: b images, n tokens of the scale, v vocabulary, c code dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lightning_mvar.checkpoints.pair import check_pair
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR, MVARState
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer


class Step(NamedTuple):
    """A scale of the images that are drawn."""

    tokens: Tensor  # (b, n) int64
    f_hat: Tensor  # (b, c, s, s) including this scale


class Known(NamedTuple):
    """Tokens of given images, and which of them are kept."""

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


@torch.no_grad()  # type: ignore[misc]  # not inference_mode: FSDP2 trains on with the buffers it gathers here
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
    known: Known | None = None,
    return_tokens: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample an image for each label. The defaults are those of the papers' scores.

    Args:
        model: in eval mode, on the device to sample on.
        tokenizer: in eval mode, on the same device.
        labels: (b,) int64 classes in [0, num_classes]; `num_classes` means unconditional.
        guidance: classifier-free guidance at the finest scale, growing from 0 at the coarsest; 0 for none. A network
            that predicts single tokens is guided alike at all of them, as LlamaGen (arXiv 2406.06525) is.
        top_k: draw among the k most likely tokens; 0 for all.
        top_p: then among the fewest whose probability reaches p; 1 for all.
        smooth: mix the codebook by a Gumbel-softmax instead of drawing one code: for looking at, never for scores.
        generator: source of randomness on the CPU, one for all images or one for each; None for torch's own.
        known: tokens of images to keep a part of, and of which: the others are drawn to go with them.
        return_tokens: also return the tokens.

    Returns:
        Images (b, 3, H, W) in [0, 1], and with `return_tokens` the tokens (b, l) int64.

    Raises:
        InputError: if the model and the tokenizer do not belong together, or an argument is out of range.
    """
    settings: dict[str, Any] = {"guidance": guidance, "top_k": top_k, "top_p": top_p, "smooth": smooth}
    drawn = []
    for step in draw_scales(model, tokenizer, labels, generator=generator, known=known, **settings):
        drawn.append(step.tokens)
    images = decoded(tokenizer, step.f_hat)
    return (images, torch.cat(drawn, dim=1)) if return_tokens else images


@torch.no_grad()
def decoded(tokenizer: Tokenizer, f_hat: Tensor) -> Tensor:
    """(b, c, s, s) of any scale -> images (b, 3, H, W) in [0, 1]."""
    return (tokenizer.decode_features(f_hat).clamp(-1, 1) + 1) / 2


@torch.no_grad()
def draw_scales(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    *,
    guidance: float,
    top_k: int,
    top_p: float,
    smooth: bool,
    generator: Generator | Sequence[Generator] | None = None,
    known: Known | None = None,
) -> Iterator[Step]:
    """What `generate` does, scale by scale, coarse to fine; its arguments are those of `generate`."""
    check_arguments(model, tokenizer, labels, guidance, top_k, top_p, generator)
    check_known(known, len(labels), model.config.schedule.num_tokens)
    schedule, quantizer, device = model.config.schedule, tokenizer.quantizer, labels.device
    by_token = model.config.prediction == "token"
    guided = guidance > 0
    both = torch.cat([labels, torch.full_like(labels, model.config.num_classes)]) if guided else labels
    state = model.init_state(both)
    inputs, f_hat = None, quantizer.empty(len(labels))
    for k, (offset, length) in enumerate(zip(schedule.offsets, schedule.lengths, strict=True)):
        drawn = []  # tokens and codes of each step of this scale
        n = 1 if by_token else length
        for begin in range(offset, offset + length, n):
            logits, state = model.step(inputs, state)
            if guided:
                conditional, unconditional = logits.chunk(2)
                strength = guidance * (1 if by_token else schedule.ratio(k))
                logits = (1 + strength) * conditional - strength * unconditional
            tokens = draw(logits, uniform((len(labels), n), generator, device), top_k, top_p)
            codes = quantizer.codebook(tokens)
            if smooth:
                noise = uniform((len(labels), n, logits.shape[-1]), generator, device)
                codes = gumbel_mixture(logits, noise, schedule.ratio(k), top_k, top_p) @ quantizer.codebook.weight
            if known is not None:
                here = slice(begin, begin + n)
                tokens = torch.where(known.keep[:, here], known.tokens[:, here], tokens)
                codes = torch.where(known.keep[:, here, None], quantizer.codebook(tokens), codes)
            drawn.append((tokens, codes))
            inputs = codes.repeat(2 if guided else 1, 1, 1)
        tokens, codes = (torch.cat(parts, dim=1) for parts in zip(*drawn, strict=True))
        f_hat = quantizer.accumulate(f_hat, codes, k)
        yield Step(tokens, f_hat)
        if not by_token and k + 1 < schedule.num_scales:
            inputs = quantizer.downsample(f_hat, k + 1).repeat(2 if guided else 1, 1, 1)


def teacher_inputs(network: MVARConfig, tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """What the steps of sampling would be given, had they drawn these tokens.

    Args:
        network: whose inputs they are.
        tokenizer: that made the tokens.
        tokens: (b, l) int64.

    Returns:
        (b, l - n, c) for the n tokens of the first step: of each scale, the image so far at its resolution; of each
        token, the code of the one before.
    """
    if network.prediction == "token":
        return tokenizer.quantizer.codebook(tokens[:, :-1])
    return tokenizer.scale_inputs(tokens)


def tokens_kept(schedule: ScaleSchedule, mask: Tensor) -> Tensor:
    """Which tokens are kept of an image of which some pixels are: `mask` (H, W) bool -> (l,) bool.

    A token is, where at least half of its cell is; those of a scale of a single token, which lays out the whole image,
    wherever anything is (as in VAR's zero-shot editing).
    """
    kept = []
    for shape in schedule.shapes:
        share = F.adaptive_avg_pool2d(mask[None, None].float(), shape).flatten()
        kept.append(share >= 0.5 if len(share) > 1 else share > 0)
    return torch.cat(kept)


def compile_steps(network: MVAR) -> None:
    """Let torch.compile make one graph of each scale; on CUDA they are replayed, for batches of one size, as a whole.

    It takes minutes, once for each size of batch.

    Raises:
        InputError: if the network predicts single tokens, each of which would be another graph.
    """
    if network.config.prediction == "token":
        raise InputError("--compile makes a graph of each step: a network that predicts single tokens has too many")
    limit, scales = torch._dynamo.config.recompile_limit, network.config.schedule.num_scales
    torch._dynamo.config.recompile_limit = max(limit, 4 * scales)
    cuda = network.head.weight.is_cuda
    compiled = torch.compile(network.step, dynamic=False, mode="reduce-overhead" if cuda else "default")

    def step(scale_inputs: Tensor | None, state: MVARState) -> tuple[Tensor, MVARState]:
        if cuda and state.step == 0:
            torch.compiler.cudagraph_mark_step_begin()  # from here on, what graphs gave for other images may go
        return compiled(scale_inputs, state)

    network.step = step  # type: ignore[method-assign]


def image_generators(seed: int, numbers: Iterable[int]) -> list[Generator]:
    """A generator for each image, by its number: it is the same image in any batch."""
    return [Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number) % 2**63) for number in numbers]


def uniform(shape: tuple[int, ...], generator: Generator | Sequence[Generator] | None, device: torch.device) -> Tensor:
    """(b, ...) float32 in [0, 1), row i from generator i."""
    if generator is None or isinstance(generator, Generator):
        numbers = torch.rand(shape, generator=generator)
    else:
        numbers = torch.stack([torch.rand(shape[1:], generator=g) for g in generator])
    return numbers.to(device, non_blocking=True)  # the device is still at work on the scale before


def truncate(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities (b, n, k) and tokens (b, n, k), most likely first, after top-k and then top-p; the rest are 0."""
    size = logits.shape[-1]
    logits, tokens = logits.topk(min(top_k, size) if top_k else size, dim=-1)
    probabilities = logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = before >= top_p
    outside[..., 0] = False
    return probabilities.masked_fill(outside, 0), tokens


def draw(logits: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (b, n, v) and uniform numbers (b, n) in [0, 1) -> tokens (b, n) int64, by inverting the distribution."""
    probabilities, tokens = truncate(logits, top_k, top_p)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniforms[..., None] * cumulative[..., -1:]
    choice = torch.searchsorted(cumulative, target)  # the first token to reach the target, so never one of weight 0
    choice = choice.clamp(max=tokens.shape[-1] - 1)  # logits that are not numbers must not become an index error
    return tokens.gather(-1, choice)[..., 0]


def gumbel_mixture(logits: Tensor, uniforms: Tensor, ratio: float, top_k: int, top_p: float) -> Tensor:
    """Weights (b, n, v) of a soft draw: Gumbel noise from `uniforms` (b, n, v), temperature falling with the scale."""
    probabilities, tokens = truncate(logits, top_k, top_p)
    kept = torch.zeros_like(logits).scatter(-1, tokens, probabilities) > 0
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    gumbel = -torch.log(-torch.log(uniforms.clamp(1e-9, 1 - 1e-7)))
    noisy = (logits * (1 + ratio)).masked_fill(~kept, -torch.inf) + gumbel
    return (noisy / temperature).softmax(dim=-1)


def check_arguments(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    guidance: float,
    top_k: int,
    top_p: float,
    generator: Generator | Sequence[Generator] | None,
) -> None:
    check_pair(model.config, tokenizer.config, "tokenizer")
    if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() > model.config.num_classes:
        raise InputError(f"labels must be (b,) classes in [0, {model.config.num_classes}], got {labels.tolist()}")
    if guidance < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise InputError(f"guidance and top_k must not be negative, top_p in (0, 1]: got {guidance}, {top_k}, {top_p}")
    if isinstance(generator, Sequence) and len(generator) != len(labels):
        raise InputError(f"{len(generator)} generators for {len(labels)} labels")


def check_known(known: Known | None, images: int, num_tokens: int) -> None:
    expected = (images, num_tokens)
    if known is not None and (known.tokens.shape != expected or known.keep.shape != expected):
        shapes = f"{tuple(known.tokens.shape)} and {tuple(known.keep.shape)}"
        raise InputError(f"known tokens, and which are kept, must both be {expected}, got {shapes}")
