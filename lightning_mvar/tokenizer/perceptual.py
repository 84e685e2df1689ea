"""Image distances in feature space, for the tokenizer's perceptual loss.

A distance is any `nn.Module` that maps two batches of images (b, 3, H, W) in [-1, 1] to distances (b,), differentiable
in the first. `LPIPS` is the published one (arXiv 1801.03924), on VGG16 (arXiv 1409.1556). `FeatureDistance` builds one
from a feature extractor.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.io import known_files
from lightning_mvar.io.tensors import StateDict, check_state_dict, load_strictly, read_torch

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels between pooling layers
# LPIPS's constants for ImageNet's mean and standard deviation, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-8  # under the square root of the feature norm, whose gradient at 0 is undefined


class VGG16(nn.Module):
    """VGG16 convolutions: images (b, 3, H, W) in [-1, 1] -> the five feature maps before each pooling and at the end.

    Layers are numbered as in torchvision.

    Args:
        weights: torchvision's file `vgg16-397923af.pth`; its classifier is ignored. By default, it is downloaded on
            first use.

    Raises:
        InputError: if the file does not exist, is unavailable, or has other content.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        path = known_files.VGG16.path(weights)
        layers: list[nn.Module] = []
        self.taps: list[int] = []  # indices of the layers whose feature maps are returned
        channels = 3
        with torch.device("meta"):
            for block in BLOCKS:
                for width in block:
                    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                    channels = width
                self.taps.append(len(layers) - 1)
                layers.append(nn.MaxPool2d(2))
            self.features = nn.Sequential(*layers[:-1])
        state = {name: tensor for name, tensor in read_torch(path).items() if not name.startswith("classifier.")}
        load_strictly(self, state, path)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = (images - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                maps.append(x)
        return maps


class LPIPS(nn.Module):
    """Published perceptual distance: channel-weighted squared differences of VGG16's normalized feature maps.

    Frozen and in eval mode.

    Args:
        vgg: torchvision's weights, file `vgg16-397923af.pth`. By default, they are downloaded on first use.
        heads: LPIPS's weights of version 0.1, file `vgg.pth`; by default the copy bundled with torchmetrics.

    Raises:
        InputError: if a file does not exist or has other content.
    """

    def __init__(self, vgg: str | None = None, heads: str | None = None) -> None:
        super().__init__()
        self.vgg = VGG16(vgg)
        for number, weight in enumerate(read_heads(bundled_heads() if heads is None else Path(heads))):
            self.register_buffer(f"head{number}", weight)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Returns distances (b,) float32 between two batches of images (b, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            expected = self.vgg(others)
        total = images.new_zeros(len(images), dtype=torch.float32)
        for number, both in enumerate(zip(self.vgg(images), expected, strict=True)):
            a, b = (maps.float() / (maps.float().square().sum(dim=1, keepdim=True) + EPSILON).sqrt() for maps in both)
            total = total + ((a - b).square() * self.get_buffer(f"head{number}")).sum(dim=1).mean(dim=(1, 2))
        return total


def bundled_heads() -> Path:
    spec = find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "functional/image/lpips_models/vgg.pth"


def read_heads(path: Path) -> list[Tensor]:
    """Reads the weights (1, c, 1, 1) of LPIPS's five linear layers.

    Raises:
        InputError: if the file does not exist or has other content.
    """
    state: StateDict = read_torch(path)
    names = [f"lin{number}.model.1.weight" for number in range(len(BLOCKS))]
    expected = {name: torch.empty(1, block[-1], 1, 1) for name, block in zip(names, BLOCKS, strict=True)}
    known = {re.sub(r"^module\.", "", name): tensor for name, tensor in state.items()}
    check_state_dict(expected, known, f"{path} is not LPIPS's weight file for VGG")
    return [known[name].float() for name in names]


class FeatureDistance(nn.Module):
    """Squared distance between normalized features of an extractor, as used by the metrics.

    The extractor must be differentiable, as the classifiers of the embedded images are. `InceptionV3` is not, because
    it rounds images to 8 bits, as published scores require.

    Args:
        extractor: images (b, 3, H, W) in [0, 1] -> features (b, f).
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Returns distances (b,) in [0, 4] between two batches of images (b, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            expected = self.extractor(others / 2 + 0.5)
        a, b = (F.normalize(f.float(), dim=1) for f in (self.extractor(images / 2 + 0.5), expected))
        return (a - b).square().sum(dim=1)
