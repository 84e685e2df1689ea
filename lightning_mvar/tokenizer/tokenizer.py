"""The tokenizer: encoder, residual quantizer, decoder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.devices import device_of
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.scales import ScaleSchedule, Shape, format_shape
from lightning_mvar.tokenizer.autoencoder import Decoder, Encoder, conv3x3
from lightning_mvar.tokenizer.quantizer import PyramidStep, ResidualQuantizer

# Maximum size of the decoder's finest feature map, which limits how many images are decoded at once; other devices
# decode one at a time. On a CPU, larger buffers would be allocated anew by the system each time, which is slower than
# smaller batches. On a GPU, the limit allows 16 images of 256 pixels in bfloat16, which take 2.1 GiB in total: few
# launches, and enough memory is left for a training run.
DECODER_MAP_BYTES = {"cpu": 2**25, "cuda": 5 * 2**26}

# Largest values, which keep a forged config from allocating or looping without limit.
LIMITS = {
    "vocab_size": 2**16,
    "code_dim": 2**14,
    "channels": 2**14,
    "blocks": 2**6,
    "num_phi": 2**10,
    "norm_groups": 2**14,
}
MAX_LEVELS, MAX_MULTIPLIER, MAX_SIDE = 12, 2**8, 2**14  # levels, channel multiplier, pixels per side of an image


@dataclass(frozen=True)
class TokenizerConfig:
    """Architecture of a tokenizer; the defaults are the published model.

    Args:
        schedule: the scales; the last has the size of the encoder's features.
        vocab_size: v, size of the codebook.
        code_dim: c, channels per code.
        channels: channels of the encoder's first level (upstream `ch`).
        multipliers: channels of each level as multiples of `channels`; m levels downsample by 2 ** (m - 1).
        blocks: residual blocks per encoder level; the decoder has one more.
        num_phi: number of phi convolutions, shared among the scales.
        norm_groups: number of groups in each GroupNorm; in small networks, fewer groups preserve the mean over the
            image, which the coarsest scales quantize.
    """

    schedule: ScaleSchedule = field(default_factory=ScaleSchedule)
    vocab_size: int = 4096
    code_dim: int = 32
    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    num_phi: int = 4
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if self.vocab_size > 2**16:
            raise InputError(
                f"tokenizer.vocab_size {self.vocab_size} does not fit the uint16 tokens of shards; use at most 65536"
            )
        for name, limit in LIMITS.items():
            require_in(f"[1, {limit}]", "tokenizer.", **{name: getattr(self, name)})
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"tokenizer.multipliers must be positive, got {self.multipliers}")
        if len(self.multipliers) > MAX_LEVELS or max(self.multipliers) > MAX_MULTIPLIER:
            raise InputError(
                f"tokenizer.multipliers must be at most {MAX_LEVELS} numbers up to {MAX_MULTIPLIER}, got "
                f"{len(self.multipliers)} up to {max(self.multipliers)}"
            )
        if max(self.shape) > MAX_SIDE:
            raise InputError(
                f"tokenizer.schedule and {len(self.multipliers)} tokenizer.multipliers make images of "
                f"{format_shape(self.shape)} pixels; at most {MAX_SIDE} per side"
            )

    @property
    def downsampling(self) -> int:
        """Ratio of image side to feature side."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def shape(self) -> Shape:
        """Height and width of the images, in pixels."""
        height, width = self.schedule.shapes[-1]
        return height * self.downsampling, width * self.downsampling


class Reconstruction(NamedTuple):
    """Outputs of a training pass from images to reconstructions."""

    features: Tensor  # (b, c, s, t) before quantization
    steps: list[PyramidStep]  # one per scale
    codebook: Tensor  # () mean over scales of mse(f_hat, sg(features)): loss of codes and phi
    commitment: Tensor  # () mean over scales of mse(sg(f_hat), features): loss of the encoder
    codes: Tensor  # (v, c) copy of the codebook, which may be updated before the backward pass
    maps: Tensor  # (b, channels, H, W) input of the decoder's last convolution
    decoded: Tensor  # (b, 3, H, W) not clamped


class Tokenizer(nn.Module):
    """Converts images to packed tokens and back. For inference, use eval mode and no_grad; `LitTokenizer` trains it."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        autoencoder = (config.channels, config.multipliers, config.blocks, config.code_dim, config.norm_groups)
        self.encoder, self.decoder = Encoder(*autoencoder), Decoder(*autoencoder)
        self.quant_conv = conv3x3(config.code_dim, config.code_dim)
        self.post_quant_conv = conv3x3(config.code_dim, config.code_dim)
        self.quantizer = ResidualQuantizer(config.schedule, config.vocab_size, config.code_dim, config.num_phi)

    def forward(self, images: Tensor, scales: Tensor | None = None) -> Reconstruction:
        """Reconstructs images (b, 3, H, W) in [-1, 1], with a straight-through gradient at the quantizer.

        Args:
            images: images of the tokenizer's size.
            scales: (b,) number of scales, coarse to fine, from which each image is decoded; all by default.
        """
        features = self.features(images)
        steps = list(self.quantizer.pyramid(features))
        codebook = torch.stack([F.mse_loss(step.f_hat, features.detach()) for step in steps]).mean()
        commitment = torch.stack([F.mse_loss(step.f_hat.detach(), features) for step in steps]).mean()
        f_hat = steps[-1].f_hat
        if scales is not None:
            f_hat = torch.stack([step.f_hat for step in steps])[
                scales - 1, torch.arange(len(images), device=images.device)
            ]
        maps = self.decoder.maps(self.post_quant_conv(features + (f_hat - features).detach()))
        codes = self.quantizer.codebook.weight.clone()
        return Reconstruction(features, steps, codebook, commitment, codes, maps, self.decoder.conv_out(maps))

    def features(self, images: Tensor) -> Tensor:
        """Encodes images (b, 3, H, W) in [-1, 1] as features (b, c, s, t) before quantization.

        Raises:
            InputError: if the images do not have the size that matches the schedule.
        """
        height, width = self.config.shape
        if images.shape[1:] != (3, height, width):
            raise InputError(
                f"the tokenizer takes images (b, 3, {height}, {width}), got {tuple(images.shape)}: set "
                f"data.resolution, or the last of tokenizer.schedule.side_lengths, to match"
            )
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (b, 3, H, W) in [-1, 1] as tokens (b, l) int64 in [0, v)."""
        return self.quantizer.encode(self.features(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Decodes tokens (b, l) to images (b, 3, H, W) in [-1, 1]."""
        return self.decode_features(self.quantizer.decode(tokens)).clamp(-1, 1)

    def decode_steps(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yields the images (b, 3, H, W) in [-1, 1] decoded from tokens (b, l) after each scale, coarse to fine."""
        for f_hat in self.quantizer.f_hats(tokens):
            yield self.decode_features(f_hat).clamp(-1, 1)

    def decode_features(self, f_hat: Tensor) -> Tensor:
        """Decodes f_hat (b, c, s, t) to images (b, 3, H, W) in the dtype of `f_hat`, not clamped.

        Large batches are decoded in parts to limit memory, unless gradients are enabled: backward needs all the maps.
        """
        dtype = self.post_quant_conv.weight.dtype
        map_bytes = self.config.channels * self.config.multipliers[0] * math.prod(self.config.shape) * dtype.itemsize
        max_bytes = DECODER_MAP_BYTES.get(f_hat.device.type, map_bytes)
        part_size = len(f_hat) if torch.is_grad_enabled() else max(1, max_bytes // map_bytes)
        parts = f_hat.to(dtype).split(part_size)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts]).to(f_hat.dtype)

    def lower(self, dtype: torch.dtype) -> Tokenizer:
        """Casts the decoder in place for faster sampling; codebook, phi and f_hat keep their dtype."""
        lower_convolutions(dtype, self.post_quant_conv, self.decoder)
        return self

    def lower_encoder(self, dtype: torch.dtype) -> Tokenizer:
        """Casts the encoder in place for faster tokenizing; its features then have this dtype."""
        lower_convolutions(dtype, self.encoder, self.quant_conv)
        return self

    def scale_inputs(self, tokens: Tensor) -> Tensor:
        """Returns the teacher-forcing input (b, l - first, c) of tokens (b, l); uses only codebook and phi."""
        return self.quantizer.scale_inputs(tokens)

    def with_schedule(self, schedule: ScaleSchedule) -> Tokenizer:
        """Returns a tokenizer for images of another size that shares the weights, which are convolutions and codes."""
        with torch.device("meta"):
            other = Tokenizer(replace(self.config, schedule=schedule))
        other.load_state_dict(self.state_dict(), assign=True)
        return other.train(self.training)

    def fingerprint(self) -> str:
        """Returns a machine-independent hash of configuration and weights, stored in token shards."""
        return fingerprint(self, json.dumps(asdict(self.config), sort_keys=True))


def lower_convolutions(dtype: torch.dtype, *modules: nn.Module) -> None:
    """Casts modules in place; for half precision on a CPU, also converts their weights to channels_last.

    On a GPU, GroupNorm would copy each map to the other layout, and the next convolution would copy it back.
    """
    for module in modules:
        module.to(dtype)
        if dtype.itemsize == 2 and device_of(module).type == "cpu":
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
