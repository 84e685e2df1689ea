"""Sampling of images, scale by scale (VAR, arXiv 2404.02905, section 3.2; guidance as in its code).

The network's state is carried from scale to scale, so no prefix is ever recomputed. The random numbers of an image
depend only on its key (`sampling.philox`), so the batch affects the result only by rounding (docs/devices.md has
figures).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lightning_mvar.checkpoints.pair import check_pair
from lightning_mvar.devices import without_autocast
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.sampling.graphs import ScaleGraphs
from lightning_mvar.sampling.guidance import load_guide
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import BatchInputs, KnownTokens, ScaleDrawer, Step
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer

MAX_STATE_BYTES = 2**33
WEIGHTS_TOLERANCE = 1e-3  # of the sum of class weights, which may be in half precision
# Source of random numbers: CPU generators, one for all images or one per image, from which each image's key is drawn;
# keys (b, 2) of `image_keys`; or None for torch's default generator.
Randomness = Generator | Sequence[Generator] | Tensor | None


@overload
def generate(
    model: MVAR, tokenizer: Tokenizer, labels: Tensor, *, return_tokens: Literal[False] = False, **settings: Any
) -> Tensor: ...


@overload
def generate(
    model: MVAR, tokenizer: Tokenizer, labels: Tensor, *, return_tokens: Literal[True], **settings: Any
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()  # not inference_mode: FSDP2 reuses the buffers gathered here in training
def generate(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    *,
    guidance: float | tuple[float, ...] = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    generator: Randomness = None,
    known: KnownTokens | None = None,
    return_tokens: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples one image per label. The defaults are the settings of the papers' scores.

    Args:
        model: in eval mode, on the device to sample on.
        tokenizer: in eval mode, on the same device.
        labels: (b,) integer classes in [0, num_classes]; `num_classes` means unconditional. Or (b, num_classes + 1)
            weights that mix the embeddings of classes, non-negative with sum 1. Best on the CPU: checking labels on a
            GPU makes the host wait.
        guidance: classifier-free guidance scale at the finest scale, growing from 0 at the coarsest; 0 for none. Or one
            number per scale.
        top_k: sample from the k most likely tokens; 0, or more than the vocabulary has, for all.
        top_p: then from the fewest tokens whose probabilities sum to p; 0 or 1 for all.
        smooth: mix codes by a Gumbel-softmax instead of drawing one: smoother images for viewing, never for scores.
        generator: CPU generator, one for all images or one per image, or keys (b, 2) of `image_keys`; None for torch's
            default generator.
        known: tokens of given images, and which of them to keep; the others are drawn conditioned on those.
        return_tokens: also return the tokens.
        others: other `SamplingSettings` by name, except the seed, which `generator` replaces. A `guidance_network` is
            read in each call; `MVARPipeline` keeps it in memory.

    Returns:
        Images (b, 3, H, W) in [0, 1], and with `return_tokens` the tokens (b, l) int64.

    Raises:
        InputError: if the tokenizer or the scorer of drafts does not fit the model, or an argument is out of range.
    """
    if "seed" in others:
        raise InputError("generate takes a generator instead of a seed: pass generator=image_keys(seed, range(images))")
    settings = SamplingSettings(guidance, top_k, top_p, smooth, **others)
    if known is not None:
        check_known(known, labels, model.config)
    images, tokens = draw_images(model, tokenizer, labels, settings, generator, known)
    return (images, tokens) if return_tokens else images


@torch.no_grad()
def draw_images(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    settings: SamplingSettings,
    generator: Randomness = None,
    known: KnownTokens | None = None,
    graphs: ScaleGraphs | None = None,
    guide: MVAR | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws images (b, 3, H, W) in [0, 1] and their tokens (b, l) int64; see `draw_scales`."""
    drawn = []
    for step in draw_scales(model, tokenizer, labels, settings, generator, known, graphs, guide):
        drawn.append(step.tokens)
    return decode_images(tokenizer, step.f_hat), torch.cat(drawn, dim=1)


@torch.no_grad()
def decode_images(tokenizer: Tokenizer, f_hat: Tensor) -> Tensor:
    """Decodes f_hat (b, c, s, s) of any scale to images (b, 3, H, W) in [0, 1], NaN where pixels are not finite."""
    with without_autocast(f_hat):  # autocast is for the network only
        pixels = tokenizer.decode_features(f_hat)
        return (pixels.masked_fill(pixels.isinf(), torch.nan).clamp(-1, 1) + 1) / 2


@torch.no_grad()
def draw_scales(
    model: MVAR,
    tokenizer: Tokenizer,
    labels: Tensor,
    settings: SamplingSettings,
    generator: Randomness = None,
    known: KnownTokens | None = None,
    graphs: ScaleGraphs | None = None,
    guide: MVAR | None = None,
) -> Iterator[Step]:
    """Draws scale by scale, coarse to fine; see `generate` for the other arguments.

    Known tokens are not checked: for tokens on a GPU, the host would wait in every batch.

    Args:
        graphs: CUDA graphs to replay, or to capture if there are none yet.
        guide: weaker network on the same device; None loads the one that `settings` names.

    Raises:
        InputError: if the tokenizer or the scorer of drafts does not fit the model, or an argument is out of range.
    """
    check_arguments(model, tokenizer, labels, settings)
    keys, device = keys_from(generator, len(labels)), tokenizer.quantizer.codebook.weight.device
    if known is not None:
        known = KnownTokens(*(part.to(device, non_blocking=True) for part in known))
    dtype = torch.float32 if labels.is_floating_point() else torch.int64
    batch = BatchInputs(labels.to(device, dtype, non_blocking=True), keys.to(device, non_blocking=True), known)
    guide = load_guide(settings.guide, model.config, tokenizer) if guide is None else guide
    drawer = ScaleDrawer(model, tokenizer.quantizer, settings, guide, settings.choice.load_scorer(tokenizer.quantizer))
    yield from drawer.steps(batch) if graphs is None else graphs.steps(drawer, batch)


def max_batch_size(network: MVARConfig) -> int:
    """Returns how many images may be drawn at once with guidance during a training run.

    KV caches in float32, the largest state of all mixers, then stay within `MAX_STATE_BYTES`.
    """
    cache_bytes = 2 * network.depth * network.schedule.num_tokens * network.width * 4
    return max(1, MAX_STATE_BYTES // (2 * cache_bytes))


def teacher_inputs(network: MVARConfig, tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Returns the teacher-forcing inputs, equal to those of the sampling steps that draw the same tokens.

    Args:
        network: config of the network that takes the inputs.
        tokenizer: tokenizer of the tokens.
        tokens: (b, l) int64.

    Returns:
        (b, l - n, c) if the first step draws n tokens: for each scale, f_hat of the earlier scales at its resolution;
        for a network that predicts single tokens, the code of the previous token.
    """
    if network.prediction == "token":
        return tokenizer.quantizer.codebook(tokens[:, :-1])
    return tokenizer.scale_inputs(tokens)


def kept_tokens_mask(schedule: ScaleSchedule, mask: Tensor) -> Tensor:
    """Returns the tokens to keep, (l,) bool, given the pixels to keep, (H, W) bool.

    A token is kept if more than half of its cell is. The token of a 1 x 1 scale, which sets the layout of the complete
    image, is kept if any pixel is.

    For a centered box of half the side, these are the masks of VAR's zero-shot editing. They differ in cells that an
    edge of the mask crosses: VAR interpolates the mask, reduced to the last scale, at the center of each cell. VAR also
    keeps the token of the 1 x 1 scale even if no pixel is kept.
    """
    kept = []
    for shape in schedule.shapes:
        share = F.adaptive_avg_pool2d(mask[None, None].float(), shape).flatten()
        kept.append(share > (0.5 if len(share) > 1 else 0))
    return torch.cat(kept)


def keys_from(generator: Randomness, count: int) -> Tensor:
    """Returns the key (b, 2) int64 of each image; raises InputError unless there is one generator or key per image."""
    if isinstance(generator, Tensor):
        if generator.shape != (count, 2) or generator.dtype != torch.int64:
            raise InputError(f"keys of {count} images must be ({count}, 2) int64, got {tuple(generator.shape)}")
        return generator
    if generator is None or isinstance(generator, Generator):
        return torch.randint(2**32, (count, 2), generator=generator)
    if len(generator) != count:
        raise InputError(f"{len(generator)} generators for {count} labels")
    return torch.cat([torch.randint(2**32, (1, 2), generator=each) for each in generator])


def check_arguments(model: MVAR, tokenizer: Tokenizer, labels: Tensor, settings: SamplingSettings) -> None:
    check_pair(model.config, tokenizer.config, "tokenizer")
    settings.check(model.config)
    if labels.is_floating_point() and labels.ndim == 2:
        check_weights(labels, model.config.num_classes, settings)
        return
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    num_classes = model.config.num_classes
    found = labels.flatten().tolist()  # the only synchronization if the labels are on a GPU
    if not is_integer or labels.ndim != 1 or not found or not 0 <= min(found) <= max(found) <= num_classes:
        raise InputError(
            f"labels must be (b,) integers, classes in [0, {num_classes}], got {labels.dtype} {tuple(labels.shape)} "
            f"{found[:8]}"
        )
    if settings.drafts > 1 and max(found) == num_classes:
        raise InputError("drafts need classes, because the scorer was trained on classes only: set drafts to 1")


def check_weights(weights: Tensor, num_classes: int, settings: SamplingSettings) -> None:
    """Raises InputError unless each row of weights (b, num_classes + 1) mixes classes, and the settings allow it."""
    fits = weights.shape[1] == num_classes + 1 and len(weights) > 0 and bool((weights >= 0).all())
    if not fits or not bool(((weights.double().sum(dim=1) - 1).abs() < WEIGHTS_TOLERANCE).all()):
        raise InputError(
            f"weights of classes must be (b, {num_classes + 1}), non-negative with sum 1, got {tuple(weights.shape)} "
            f"with sums {weights.double().sum(dim=1)[:8].tolist()}"
        )
    if settings.drafts > 1:
        raise InputError("drafts need one class per image, because the scorer knows no mixes: set drafts to 1")


def check_known(known: KnownTokens, labels: Tensor, network: MVARConfig) -> None:
    """Raises InputError unless known tokens and mask have the shape of the images' tokens, and the tokens are valid."""
    expected = (*labels.shape[:1], network.schedule.num_tokens)
    if known.tokens.shape != expected or known.keep.shape != expected:
        shapes = f"{tuple(known.tokens.shape)} and {tuple(known.keep.shape)}"
        raise InputError(f"known tokens and their keep mask must both be {expected}, got {shapes}")
    if (known.tokens.dtype, known.keep.dtype) != (torch.int64, torch.bool):
        types = f"{known.tokens.dtype} and {known.keep.dtype}"
        raise InputError(f"known tokens must be int64, and their keep mask bool, got {types}")
    lowest, highest = known.tokens.aminmax()  # synchronizes if the tokens are on a GPU
    if lowest < 0 or highest >= network.vocab_size:
        raise InputError(
            f"known tokens must be in [0, {network.vocab_size - 1}], even those not kept, got {lowest} to {highest}"
        )
