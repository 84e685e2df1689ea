"""Pictures of many images: grids and coarse-to-fine strips, as arrays and as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_mvar.files import atomic_path
from lightning_mvar.tokenizer.tokenizer import Tokenizer

PADDING = 2  # pixels between the images of a grid


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(..., 3, H, W) in [0, 1] -> (..., H, W, 3) in 0 ... 255, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def image_grid(images: Tensor, columns: int) -> Tensor:
    """(n, 3, H, W) -> one image (3, rows (H + pad) + pad, columns (W + pad) + pad), filled row by row on black."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    grid = images.new_zeros(channels, rows * (height + PADDING) + PADDING, columns * (width + PADDING) + PADDING)
    for i, image in enumerate(images):
        top = PADDING + (i // columns) * (height + PADDING)
        left = PADDING + (i % columns) * (width + PADDING)
        grid[:, top : top + height, left : left + width] = image
    return grid


def formation_strip(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Tokens (b, l) -> a picture (3, H, W) in [0, 1]: a row for each image, a column for each scale reached."""
    steps = torch.stack(list(tokenizer.decode_steps(tokens)), dim=1) / 2 + 0.5  # (b, k, 3, H, W)
    return image_grid(steps.flatten(0, 1), columns=steps.shape[1])


def save_image(image: Tensor, path: str | Path) -> None:
    """Write (3, H, W) in [0, 1] as a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        Image.fromarray(to_uint8(image)).save(temporary, format="PNG")
