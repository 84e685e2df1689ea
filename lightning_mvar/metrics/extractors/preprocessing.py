"""Resizing and normalization of images for pretrained networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.scales import Shape


def preprocess(
    images: Tensor, shape: Shape, mean: Sequence[float], std: Sequence[float], mode: str = "bicubic"
) -> Tensor:
    """Resizes and normalizes images as Pillow and torchvision do for image files: (b, 3, H, W) -> (b, 3, *shape).

    Args:
        images: in [0, 1]; rounded to 8 bits first, because published scores are computed from image files.
        shape: (height, width) that the network takes; the whole image is resized to it, without cropping.
        mean, std: per channel, for pixels in [0, 1].
        mode: `bicubic` or `bilinear`, both with antialiasing.
    """
    pixels = (images.float() * 255).round()
    for size in ((images.shape[2], shape[1]), shape):  # Pillow's two passes, each rounded to 8 bits
        pixels = F.interpolate(pixels, size, mode=mode, antialias=True).round().clamp(0, 255)
    shift, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (pixels / 255 - shift) / scale
