"""Convolutional encoder and decoder of the tokenizer (VQGAN, arXiv 2012.09841, as used by VAR).

Shapes: b batch, c channels, H W image, h w feature map of a level. `multipliers` gives the channels of each level as
multiples of `channels`. Each level except the last halves the side, so m levels downsample by 2 ** (m - 1). `groups` is
the number of groups in GroupNorm.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class GroupNorm(nn.GroupNorm):
    """GroupNorm with statistics in float32 whose output has the dtype of its input, even under autocast.

    CUDA's autocast, unlike the CPU's, would return float32 and double the size of the feature maps kept for backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def group_norm(channels: int, groups: int) -> GroupNorm:
    """Returns a GroupNorm with `groups` groups, or fewer if that does not divide `channels`.

    Normalizing a single-channel group removes its mean over the image, which the coarsest scales encode; small networks
    need few groups.
    """
    return GroupNorm(math.gcd(groups, channels), channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, plus a skip connection (1 x 1 convolution if the channels change)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels, groups), conv3x3(in_channels, out_channels)
        self.norm2, self.conv2 = group_norm(out_channels, groups), conv3x3(out_channels, out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.second(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        return self.conv1(F.silu(self.norm1(x)))

    def second(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm2(x)))

    def enable_activation_checkpointing(self) -> None:
        """Keeps only the inputs of the norms for the backward pass, which recomputes norm and SiLU.

        Convolutions are not recomputed: recomputation stops at the last tensor that is needed, which is their input.
        """
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        self.first = partial(recompute, self.first)  # type: ignore[method-assign]
        self.second = partial(recompute, self.second)  # type: ignore[method-assign]


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # (b, h w, c) each
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj(y.transpose(1, 2).view_as(x))


class Downsample(nn.Conv2d):
    """Halves the side: padding by one at the right and bottom, then a 3 x 3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the side: nearest neighbor, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each optionally followed by attention, then a change of resolution."""

    def __init__(self, channels: list[int], groups: int, attention: bool, resample: nn.Module) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairs)
        self.attentions = nn.ModuleList(SpatialAttention(b, groups) if attention else nn.Identity() for _, b in pairs)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


def middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, groups),
        SpatialAttention(channels, groups),
        ResidualBlock(channels, channels, groups),
    )


class Encoder(nn.Module):
    """Images (b, 3, H, W) -> features (b, code_dim, h, w); `blocks` residual blocks per level."""

    def __init__(self, channels: int, multipliers: tuple[int, ...], blocks: int, code_dim: int, groups: int) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = conv3x3(3, channels)
        self.levels = nn.ModuleList(
            Level(
                [before, *[width] * blocks],
                groups,
                attention=i == last,
                resample=nn.Identity() if i == last else Downsample(width),
            )
            for i, (before, width) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.middle = middle(widths[-1], groups)
        self.norm_out, self.conv_out = group_norm(widths[-1], groups), conv3x3(widths[-1], code_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Features (b, code_dim, h, w) -> images (b, 3, H, W), with one more residual block per level than the encoder.

    `levels` is ordered as in the encoder, finest first, and runs in reverse.
    """

    def __init__(self, channels: int, multipliers: tuple[int, ...], blocks: int, code_dim: int, groups: int) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = conv3x3(code_dim, widths[-1])
        self.middle = middle(widths[-1], groups)
        self.levels = nn.ModuleList(
            Level(
                [before, *[width] * (blocks + 1)],
                groups,
                attention=i == last,
                resample=nn.Identity() if i == 0 else Upsample(width),
            )
            for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out, self.conv_out = group_norm(widths[0], groups), conv3x3(widths[0], 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv_out(self.maps(features))

    def maps(self, features: Tensor) -> Tensor:
        """Returns the input of the last convolution: (b, code_dim, h, w) -> (b, channels, H, W)."""
        x = self.middle(self.conv_in(features))
        for level in reversed(self.levels):
            x = level(x)
        return F.silu(self.norm_out(x))
