"""The InceptionV3 of December 2015, on which published FID and inception scores are computed.

It is the network of arXiv 1512.00567 as TensorFlow released it. Unlike later releases, it excludes padding from average
pooling, uses max pooling in its last block, and has 1008 classes. Layers are named as in the two published conversions
to PyTorch, torch-fidelity and pytorch-fid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mvar.devices import exact_float32, without_autocast
from lightning_mvar.io.known_files import INCEPTION

SIDE = 299
SPATIAL_CHANNELS = 7


class Convolution(nn.Sequential):
    """Convolution, batch norm and ReLU: (b, inputs, h, w) -> (b, outputs, h', w').

    `padding` is TensorFlow's: "same" zero-pads to keep height and width, "valid" adds no padding.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: str = "same"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)


class Mixed(nn.ModuleDict):
    """Inception block of parallel branches: (b, c, h, w) -> (b, c', h', w').

    Args:
        layers: pairs of source ("input" or the name of an earlier layer) and layer. Outputs that no other layer reads
            are concatenated in this order.
    """

    def __init__(self, **layers: tuple[str, nn.Module]) -> None:
        super().__init__({name: layer for name, (_, layer) in layers.items()})
        self.sources = {name: source for name, (source, _) in layers.items()}

    def forward(self, x: Tensor) -> Tensor:
        values = {"input": x}
        for name, layer in self.items():
            values[name] = layer(values[self.sources[name]])
        return torch.cat([values[name] for name in self if name not in self.sources.values()], dim=1)


def average_pool() -> nn.Module:
    """Returns a 3 x 3 average pool that excludes padding from the mean."""
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def block_a(inputs: int, pool_outputs: int) -> Mixed:
    return Mixed(
        branch1x1=("input", Convolution(inputs, 64, 1)),
        branch5x5_1=("input", Convolution(inputs, 48, 1)),
        branch5x5_2=("branch5x5_1", Convolution(48, 64, 5)),
        branch3x3dbl_1=("input", Convolution(inputs, 64, 1)),
        branch3x3dbl_2=("branch3x3dbl_1", Convolution(64, 96, 3)),
        branch3x3dbl_3=("branch3x3dbl_2", Convolution(96, 96, 3)),
        pool=("input", average_pool()),
        branch_pool=("pool", Convolution(inputs, pool_outputs, 1)),
    )


def block_b(inputs: int) -> Mixed:
    return Mixed(
        branch3x3=("input", Convolution(inputs, 384, 3, stride=2, padding="valid")),
        branch3x3dbl_1=("input", Convolution(inputs, 64, 1)),
        branch3x3dbl_2=("branch3x3dbl_1", Convolution(64, 96, 3)),
        branch3x3dbl_3=("branch3x3dbl_2", Convolution(96, 96, 3, stride=2, padding="valid")),
        pool=("input", nn.MaxPool2d(3, stride=2)),
    )


def block_c(inputs: int, width: int) -> Mixed:
    return Mixed(
        branch1x1=("input", Convolution(inputs, 192, 1)),
        branch7x7_1=("input", Convolution(inputs, width, 1)),
        branch7x7_2=("branch7x7_1", Convolution(width, width, (1, 7))),
        branch7x7_3=("branch7x7_2", Convolution(width, 192, (7, 1))),
        branch7x7dbl_1=("input", Convolution(inputs, width, 1)),
        branch7x7dbl_2=("branch7x7dbl_1", Convolution(width, width, (7, 1))),
        branch7x7dbl_3=("branch7x7dbl_2", Convolution(width, width, (1, 7))),
        branch7x7dbl_4=("branch7x7dbl_3", Convolution(width, width, (7, 1))),
        branch7x7dbl_5=("branch7x7dbl_4", Convolution(width, 192, (1, 7))),
        pool=("input", average_pool()),
        branch_pool=("pool", Convolution(inputs, 192, 1)),
    )


def block_d(inputs: int) -> Mixed:
    return Mixed(
        branch3x3_1=("input", Convolution(inputs, 192, 1)),
        branch3x3_2=("branch3x3_1", Convolution(192, 320, 3, stride=2, padding="valid")),
        branch7x7x3_1=("input", Convolution(inputs, 192, 1)),
        branch7x7x3_2=("branch7x7x3_1", Convolution(192, 192, (1, 7))),
        branch7x7x3_3=("branch7x7x3_2", Convolution(192, 192, (7, 1))),
        branch7x7x3_4=("branch7x7x3_3", Convolution(192, 192, 3, stride=2, padding="valid")),
        pool=("input", nn.MaxPool2d(3, stride=2)),
    )


def block_e(inputs: int, pool: nn.Module) -> Mixed:
    return Mixed(
        branch1x1=("input", Convolution(inputs, 320, 1)),
        branch3x3_1=("input", Convolution(inputs, 384, 1)),
        branch3x3_2a=("branch3x3_1", Convolution(384, 384, (1, 3))),
        branch3x3_2b=("branch3x3_1", Convolution(384, 384, (3, 1))),
        branch3x3dbl_1=("input", Convolution(inputs, 448, 1)),
        branch3x3dbl_2=("branch3x3dbl_1", Convolution(448, 384, 3)),
        branch3x3dbl_3a=("branch3x3dbl_2", Convolution(384, 384, (1, 3))),
        branch3x3dbl_3b=("branch3x3dbl_2", Convolution(384, 384, (3, 1))),
        pool=("input", pool),
        branch_pool=("pool", Convolution(inputs, 192, 1)),
    )


class InceptionNetwork(nn.Module):
    """Network with random weights; `InceptionV3` loads the published ones."""

    num_features = 2048
    num_spatial = 2023
    resize = f"TensorFlow 1's bilinear, to {SIDE} x {SIDE}"

    def __init__(self) -> None:
        super().__init__()
        layers = {
            "Conv2d_1a_3x3": Convolution(3, 32, 3, stride=2, padding="valid"),  # 32 x 149 x 149
            "Conv2d_2a_3x3": Convolution(32, 32, 3, padding="valid"),  # 32 x 147 x 147
            "Conv2d_2b_3x3": Convolution(32, 64, 3),  # 64 x 147 x 147
            "pool1": nn.MaxPool2d(3, stride=2),  # 64 x 73 x 73
            "Conv2d_3b_1x1": Convolution(64, 80, 1),  # 80 x 73 x 73
            "Conv2d_4a_3x3": Convolution(80, 192, 3, padding="valid"),  # 192 x 71 x 71
            "pool2": nn.MaxPool2d(3, stride=2),  # 192 x 35 x 35
            "Mixed_5b": block_a(192, 32),  # 256 x 35 x 35
            "Mixed_5c": block_a(256, 64),  # 288 x 35 x 35
            "Mixed_5d": block_a(288, 64),  # 288 x 35 x 35
            "Mixed_6a": block_b(288),  # 768 x 17 x 17
            "Mixed_6b": block_c(768, 128),  # 768 x 17 x 17
            "Mixed_6c": block_c(768, 160),  # 768 x 17 x 17
            "Mixed_6d": block_c(768, 160),  # 768 x 17 x 17
            "Mixed_6e": block_c(768, 192),  # 768 x 17 x 17
            "Mixed_7a": block_d(768),  # 1280 x 8 x 8
            "Mixed_7b": block_e(1280, average_pool()),  # 2048 x 8 x 8
            "Mixed_7c": block_e(2048, nn.MaxPool2d(3, stride=1, padding=1)),  # 2048 x 8 x 8
        }
        self.sequence = list(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.fc = nn.Linear(self.num_features, 1008)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (b, 3, H, W) in [0, 1] to pool features (b, 2048), in float32 even under autocast.

        Images are first rounded to 8 bits, because published scores are computed from image files.
        """
        return self.features_and_spatial(images)[0]

    def features_and_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns pool features and sFID features (b, 2023): 7 channels of "mixed_6/conv", 17 x 17, row by row."""
        with without_autocast(images), exact_float32():
            x = resize_like_tensorflow((images.float() * 255).round(), (SIDE, SIDE))
            x = (x - 128) / 128
            for name in self.sequence:
                x = self.get_submodule(name)(x)
                if name == "Mixed_6d":  # its first branch is mixed_6/conv
                    spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            return x.mean(dim=(2, 3)), spatial

    def logits(self, features: Tensor) -> Tensor:
        """Maps pool features (b, 2048) to logits (b, 1008), without bias, as in the published inception score."""
        with without_autocast(features):
            return features.float() @ self.fc.weight.T


class InceptionV3(InceptionNetwork):
    """InceptionV3 with the published weights, in eval mode and without gradients.

    Args:
        weights: file of torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`) or of pytorch-fid
            (`pt_inception-2015-12-05-6726825d.pth`); both hold the same weights. By default, torch-fidelity's file
            is downloaded on first use.

    Raises:
        InputError: if the file does not exist, is unavailable, or holds other weights.
    """

    def __init__(self, weights: str | None = None) -> None:
        with torch.device("meta"):
            super().__init__()
        # Some conversions lack the batch-norm counters, which evaluation does not use.
        counters = {name: torch.tensor(0) for name in self.state_dict() if name.endswith(".num_batches_tracked")}
        INCEPTION.load_into(self, weights, counters)


def resize_like_tensorflow(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes like TensorFlow 1's bilinear resize (align_corners=False): (b, c, H, W) float32 -> (b, c, *size).

    Output pixel i is sampled at i * in / out, which aligns the first pixels instead of the image centers. There is no
    antialiasing.
    """
    for dim in (3, 2):  # TensorFlow's order, for identical rounding
        old, new = images.shape[dim], size[dim - 2]
        position = torch.arange(new, dtype=torch.float32, device=images.device) * (old / new)
        lower = position.long()
        upper = (lower + 1).clamp(max=old - 1)
        first, second = images.index_select(dim, lower), images.index_select(dim, upper)
        fraction = (position - lower).view(-1, *[1] * (3 - dim))
        images = first + (second - first) * fraction
    return images
