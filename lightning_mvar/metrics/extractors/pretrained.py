"""Pretrained networks from any library as feature extractors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_mvar.devices import exact_float32, without_autocast
from lightning_mvar.metrics.extractors.preprocessing import preprocess
from lightning_mvar.scales import Shape


class PretrainedExtractor(nn.Module):
    """Pooled features of a pretrained network, for images resized (not cropped) and normalized as it expects.

    Args:
        model: name of the network.
        network: the network, in eval mode.
        shape: (height, width) of its input images.
        mean, std: per channel, for pixels in [0, 1].
        bilinear: whether to resize with bilinear instead of bicubic interpolation.
    """

    def __init__(
        self, model: str, network: nn.Module, shape: Shape, mean: Sequence[float], std: Sequence[float], bilinear: bool
    ) -> None:
        super().__init__()
        self.model, self.network, self.shape, self.mean, self.std = model, network, shape, mean, std
        self.mode = "bilinear" if bilinear else "bicubic"
        self.resize = f"Pillow's {self.mode}, to {shape[0]} x {shape[1]}"
        with torch.no_grad():
            self.num_features = self.pooled(torch.zeros(1, 3, *shape)).shape[1]

    def pooled(self, pixels: Tensor) -> Tensor:
        """Maps preprocessed pixels (b, 3, *shape) to pooled features (b, num_features)."""
        return self.network(pixels)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (b, 3, H, W) in [0, 1] to features (b, num_features), in float32 even under autocast."""
        with without_autocast(images), exact_float32():
            return self.pooled(preprocess(images, self.shape, self.mean, self.std, self.mode))
