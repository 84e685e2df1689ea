"""DINOv2 ViT-L/14, whose Frechet distance (FD-DINOv2) follows human judgment more closely than FID.

    paper                                            here
    DINOv2 (arXiv 2304.07193)                        DINOv2Network, with the layer names of facebookresearch/dinov2
    FD-DINOv2 (2306.04675, Section 4 and dgm-eval)   preprocessing; features: the class token after the last norm

Shapes: b batch, l tokens (class token and 16 x 16 patches), d width, h heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.devices import exact_float32, without_autocast
from lightning_mvar.io.known_files import DINOV2_VITL14
from lightning_mvar.metrics.extractors.preprocessing import preprocess

SIDE, PATCH = 224, 14
GRID = SIDE // PATCH  # patches per side
TRAINED_GRID = 37  # of the published position embedding, for 518 x 518 pixels
OFFSET = 0.1  # of the published code, added to the grid so that rounding cannot lose a row
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]
EPSILON = 1e-6  # of the layer norms


class Attention(nn.Module):
    """Multi-head self-attention: (b, l, d) -> (b, l, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, h, l, d / h)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with a hidden width of 4 d: (b, l, d) -> (b, l, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Learned factor per channel of a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: (b, l, d) -> (b, l, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPSILON)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, EPSILON)
        self.mlp = MLP(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2Network(nn.Module):
    """Network with random weights; `DINOv2` loads the published ones.

    Args:
        width, depth, heads: size of the vision transformer, ViT-L by default.
    """

    resize = f"Pillow's bicubic, to {SIDE} x {SIDE}"

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.num_features = width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_GRID**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # for pre-training; unused here
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (b, 3, H, W) in [0, 1] to features (b, d), in float32 even under autocast."""
        with without_autocast(images), exact_float32():
            pixels = preprocess(images, (SIDE, SIDE), MEAN, STD)
            patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)  # (b, 256, d)
            x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.position_embedding()
            for block in self.blocks:
                x = block(x)
            return self.norm(x[:, 0])

    def position_embedding(self) -> Tensor:
        """Returns the position embedding (1, l, d), interpolated to this grid as in the published code."""
        trained = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (TRAINED_GRID, TRAINED_GRID))
        scale = (GRID + OFFSET) / TRAINED_GRID  # a scale instead of a size, because sampling positions depend on OFFSET
        patches = F.interpolate(trained, scale_factor=(scale, scale), mode="bicubic")  # (1, d, 16, 16)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


class DINOv2(DINOv2Network):
    """DINOv2 ViT-L/14 with the published weights, in eval mode and without gradients.

    Args:
        weights: facebookresearch's file `dinov2_vitl14_pretrain.pth`. By default, it is downloaded on first use
            (1.2 GB).

    Raises:
        InputError: if the file does not exist, is unavailable, or holds other weights.
    """

    def __init__(self, weights: str | None = None) -> None:
        with torch.device("meta"):
            super().__init__()
        DINOV2_VITL14.load_into(self, weights)
