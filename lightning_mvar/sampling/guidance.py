"""Guidance: moves logits away from those of a guide, a worse predictor of the same tokens.

At a scale with strength s, the logits become (1 + s) l - s l_guide.

| paper                                               | here                                                        |
|-----------------------------------------------------|-------------------------------------------------------------|
| classifier-free guidance, arXiv 2207.12598, sec. 3; | `strength`: a number grows linearly over the scales, as in  |
| VAR, arXiv 2404.02905, code                         | VAR's code; the guide is the unconditional class            |
| autoguidance, arXiv 2406.02507, sec. 3              | `network`: the guide is a weaker network, of the same class |
| VPG, arXiv 2605.30317                               | `corrupt`: the guide reads a prefix with replaced tokens    |
| SSG, arXiv 2602.05534                               | `beta`: moves away from the logits of the previous scale    |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.checkpoints import StoredModel, open_trained
from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.models.parameters import lower_precision
from lightning_mvar.sampling.philox import CORRUPTION, uniform
from lightning_mvar.scales import Shape
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer
from lightning_mvar.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Guidance:
    """Strength of guidance at each scale, and the guide: by default, the unconditional class.

    `SamplingSettings` checks the values.

    Args:
        strength: guidance scale at the finest scale, growing linearly from 0 at the coarsest; or a list with one per
            scale. 0 for none. A network that predicts single tokens uses one number for all of them.
        off_from: index of the first scale that is drawn without the guide, which costs nothing from there on.
        network: guide by a weaker network with the same class instead of the unconditional class: a checkpoint of
            `fit`, a folder of `export` or a published file, with the same tokenizer, classes and scales.
        corrupt: guide by the same class after a prefix in which this share of the tokens is replaced by random ones
            (VPG), instead of the unconditional class.
        beta: also move the logits of each scale away from those of the previous scale by this factor (SSG).
    """

    strength: float | tuple[float, ...]
    off_from: int | None = None
    network: str | None = None
    corrupt: float = 0.0
    beta: float = 0.0

    def needed_network(self, network: MVARConfig) -> str | None:
        """Returns the path of the network that guides `network`; None if none is given or no scale is guided."""
        return self.network if self.num_guided_scales(network) else None

    def strengths(self, network: MVARConfig) -> tuple[float, ...]:
        """Returns the strength at each scale of a network."""
        schedule = network.schedule
        if isinstance(self.strength, tuple):
            return self.strength
        if network.prediction == "token":  # as in LlamaGen, arXiv 2406.06525
            return (self.strength,) * schedule.num_scales
        return tuple(self.strength * schedule.ratio(k) for k in range(schedule.num_scales))

    def num_guided_scales(self, network: MVARConfig) -> int:
        """Returns the number of scales, from the coarsest, at which the guide runs: up to the last guided one."""
        guided = [k for k, strength in enumerate(self.strengths(network)[: self.off_from]) if strength > 0]
        return guided[-1] + 1 if guided else 0

    def check(self, network: MVARConfig) -> None:
        """Raises InputError unless these settings fit a network."""
        check_per_scale("guidance", self.strength, network)
        scales = network.schedule.num_scales
        if self.off_from is not None and self.off_from > scales:
            raise InputError(f"guidance_off_from {self.off_from} is too large: the network draws {scales} scales")
        if self.beta and network.prediction == "token":
            raise InputError("guidance_beta compares scales, but this network predicts single tokens: drop it")


def check_per_scale(name: str, values: float | tuple[float, ...], network: MVARConfig) -> None:
    """Raises InputError unless there is one number for all scales of a network, or one per scale."""
    scales = network.schedule.num_scales
    if isinstance(values, tuple) and len(values) != scales:
        raise InputError(f"{name} has {len(values)} numbers, but the network draws {scales} scales: give one for each")


def load_guide(
    guidance: Guidance,
    network: MVARConfig,
    tokenizer: Tokenizer,
    class_names: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> MVAR | None:
    """Loads the guiding network. Callers keep it, so that all images of a set have the same guide.

    Args:
        guidance: names the guiding network.
        network: config of the guided network.
        tokenizer: tokenizer of the guided network; the guide is loaded to its device.
        class_names: class names of the guided network; empty if unknown.
        dtype: dtype of the guide's weights, see `lower_precision`.

    Returns:
        The guiding network in eval mode; None if none is given or no scale is guided.

    Raises:
        InputError: if it cannot be read, or has other tokens, classes or scales.
    """
    if (path := guidance.needed_network(network)) is None:
        return None
    stored = open_trained(path)
    for name in ("schedule", "vocab_size", "code_dim", "num_classes", "prediction"):
        ours, theirs = getattr(network, name), getattr(stored.config, name)
        if ours != theirs:
            raise InputError(f"guidance_network {path} cannot guide: its {name} is {theirs}, not {ours}")
    if class_names and stored.class_names and [*class_names] != stored.class_names:
        raise InputError(f"guidance_network {path} cannot guide: its class names differ")
    check_tokens(stored, tokenizer.quantizer)
    return lower_precision(stored.load_network().to(tokenizer.quantizer.codebook.weight.device), dtype)


def check_tokens(stored: StoredModel, quantizer: ResidualQuantizer) -> None:
    """Raises InputError if a network has another quantizer; published weights do not say which one they have."""
    if stored.tokenizer_folder is None:
        return
    ours, theirs = quantizer.state_dict(), stored.load_tokenizer().quantizer.state_dict()
    if ours.keys() != theirs.keys() or any(not torch.equal(theirs[name], ours[name].cpu()) for name in ours):
        raise InputError(
            f"guidance_network {stored.source} cannot guide: it predicts tokens of another tokenizer, "
            f"{stored.tokenizer_folder}"
        )


def unconditional_like(labels: Tensor, num_classes: int) -> Tensor:
    """Returns labels (b,) or weights (b, num_classes + 1), like `labels`, of the unconditional class."""
    if labels.is_floating_point():
        return (torch.arange(num_classes + 1, device=labels.device) == num_classes).to(labels.dtype).expand_as(labels)
    return torch.full_like(labels, num_classes)


def replace_codes(codes: Tensor, share: float, keys: Tensor, span: slice, codebook: Tensor) -> Tensor:
    """Replaces a share of the codes (b, n, c) at the positions `span` by random rows of the codebook (v, c)."""
    positions = torch.arange(span.start, span.stop, device=codes.device)[:, None]
    chance, other = uniform(keys, positions, 2, CORRUPTION).unbind(-1)  # (b, n) each
    tokens = (other * len(codebook)).long().clamp(max=len(codebook) - 1)  # a product may round up
    return torch.where((chance < share)[..., None], codebook[tokens], codes)


def sharpen(logits: Tensor, before: Tensor, shape: Shape, shape_before: Shape, beta: float) -> Tensor:
    """Moves logits (b, n, v) of a map away from the upsampled logits (b, m, v) of the previous map by factor `beta`."""
    coarse = before.transpose(1, 2).unflatten(2, shape_before)  # (b, v, height, width)
    coarse = F.interpolate(coarse, size=shape, mode="bilinear").flatten(2).transpose(1, 2)  # (b, n, v)
    return logits + beta * (logits - coarse)
