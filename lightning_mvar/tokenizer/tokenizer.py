"""The tokenizer: encoder, residual quantizer, decoder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.scales import ScaleSchedule, Shape
from lightning_mvar.tokenizer.autoencoder import Decoder, Encoder, conv3x3
from lightning_mvar.tokenizer.quantizer import PyramidStep, ResidualQuantizer

# Of the decoder's finest map, of which it holds a few at a time; on other devices images are decoded one by one. On a
# CPU, what is larger comes from the system anew each time, which takes longer than to decode one by one.
DECODER_MAP_BYTES = {"cpu": 2**25, "cuda": 2**28}


@dataclass(frozen=True)
class TokenizerConfig:
    """What a tokenizer is made of; the defaults are the published one.

    Args:
        schedule: the scales; the last is of the size of the encoder's features.
        vocab_size: v, entries of the codebook.
        code_dim: c, channels of a code.
        channels: channels of the encoder's first level (upstream `ch`).
        multipliers: channels of each level over `channels`; m levels downsample by 2 ** (m - 1).
        blocks: residual blocks of an encoder level; the decoder has one more.
        num_phi: number of phi convolutions that the scales share.
        norm_groups: groups of every group normalization; fewer keep the mean over the image, which the coarsest
            scales quantize, alive in small networks.
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
        for name in ("vocab_size", "code_dim", "channels", "blocks", "num_phi", "norm_groups"):
            if getattr(self, name) < 1:
                raise InputError(f"tokenizer.{name} must be at least 1, got {getattr(self, name)}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"tokenizer.multipliers must be positive, got {self.multipliers}")
        if self.vocab_size > 2**16:
            raise InputError(f"tokenizer.vocab_size {self.vocab_size} does not fit the shards' uint16 tokens (65536)")

    @property
    def downsampling(self) -> int:
        """Image side over feature side."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def shape(self) -> Shape:
        """Height and width of the images, in pixels."""
        height, width = self.schedule.shapes[-1]
        return height * self.downsampling, width * self.downsampling


class Reconstruction(NamedTuple):
    """What training looks at of one pass from images to images."""

    features: Tensor  # (b, c, s, t) what was quantized
    steps: list[PyramidStep]  # of each scale
    codebook: Tensor  # () mean over scales of mse(f_hat, sg(features)), which pulls codes and phi
    commitment: Tensor  # () mean over scales of mse(sg(f_hat), features), which pulls the features
    codes: Tensor  # (v, c) the codebook as it was used: a copy, which may change before the backward pass
    maps: Tensor  # (b, channels, H, W) what the decoder's last convolution saw
    decoded: Tensor  # (b, 3, H, W) not clamped


class Tokenizer(nn.Module):
    """Images to packed tokens and back. Give it eval mode and no_grad for use; see `LitTokenizer` for training."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        autoencoder = (config.channels, config.multipliers, config.blocks, config.code_dim, config.norm_groups)
        self.encoder, self.decoder = Encoder(*autoencoder), Decoder(*autoencoder)
        self.quant_conv = conv3x3(config.code_dim, config.code_dim)
        self.post_quant_conv = conv3x3(config.code_dim, config.code_dim)
        self.quantizer = ResidualQuantizer(config.schedule, config.vocab_size, config.code_dim, config.num_phi)

    def forward(self, images: Tensor, scales: Tensor | None = None) -> Reconstruction:
        """Images (b, 3, H, W) in [-1, 1] through all of it; gradients pass the quantizer straight through.

        Args:
            images: of the tokenizer's size.
            scales: (b,) from how many of the first scales each image is decoded; all where not given.
        """
        features = self.features(images)
        steps = list(self.quantizer.pyramid(features))
        codebook = torch.stack([F.mse_loss(step.f_hat, features.detach()) for step in steps]).mean()
        commitment = torch.stack([F.mse_loss(step.f_hat.detach(), features) for step in steps]).mean()
        f_hat = steps[-1].f_hat
        if scales is not None:
            f_hat = torch.stack([step.f_hat for step in steps])[scales - 1, torch.arange(len(images))]
        maps = self.decoder.maps(self.post_quant_conv(features + (f_hat - features).detach()))
        codes = self.quantizer.codebook.weight.clone()
        return Reconstruction(features, steps, codebook, commitment, codes, maps, self.decoder.conv_out(maps))

    def features(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) in [-1, 1] -> (b, c, s, t), what is quantized.

        Raises:
            InputError: if the images are not of the size that the schedule is for.
        """
        height, width = self.config.shape
        if images.shape[1:] != (3, height, width):
            raise InputError(
                f"the tokenizer takes images (b, 3, {height}, {width}), got {tuple(images.shape)}: set "
                f"data.resolution, or the last of tokenizer.schedule.side_lengths, to match"
            )
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] -> tokens (b, l) int64 in [0, v)."""
        return self.quantizer.encode(self.features(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l) -> images (b, 3, H, W) in [-1, 1]."""
        return self.decode_features(self.quantizer.decode(tokens)).clamp(-1, 1)

    def decode_steps(self, tokens: Tensor) -> Iterator[Tensor]:
        """Tokens (b, l) -> images (b, 3, H, W) in [-1, 1] as they stand after each scale, coarse to fine."""
        for f_hat in self.quantizer.f_hats(tokens):
            yield self.decode_features(f_hat).clamp(-1, 1)

    def decode_features(self, f_hat: Tensor) -> Tensor:
        """(b, c, s, t) -> (b, 3, H, W) in the dtype of `f_hat`, not clamped.

        Many images are decoded in parts, to bound memory; but not for a backward pass, which needs all maps anyway.
        """
        dtype = self.post_quant_conv.weight.dtype
        map_bytes = self.config.channels * self.config.multipliers[0] * math.prod(self.config.shape) * dtype.itemsize
        most = DECODER_MAP_BYTES.get(f_hat.device.type, map_bytes)
        at_once = len(f_hat) if torch.is_grad_enabled() else max(1, most // map_bytes)
        parts = f_hat.to(dtype).split(at_once)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts]).to(f_hat.dtype)

    def lower(self, dtype: torch.dtype) -> Tokenizer:
        """Cast the decoder in place, to sample in less time; codes and their sum over the scales stay as they are."""
        for part in (self.post_quant_conv, self.decoder):
            part.to(dtype)
            if dtype.itemsize == 2:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # what such kernels multiply
        return self

    def scale_inputs(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l) -> teacher-forcing input (b, l - first, c), from codebook and phi alone."""
        return self.quantizer.scale_inputs(tokens)

    def fingerprint(self) -> str:
        """A hash of configuration and weights, the same on every machine; token shards carry it."""
        return fingerprint(self, json.dumps(asdict(self.config), sort_keys=True))
