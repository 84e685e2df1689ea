"""Figures of many images: grids, coarse-to-fine strips and animations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_mvar.data.images.decoding import to_tensor
from lightning_mvar.io.files import atomic_path

PADDING = 2  # pixels between the images of a grid
SMALLEST_FONT, LARGEST_FONT = 11, 28  # pixels
LONGEST_NAME = 400  # maximum width of a row's name, in pixels
SMALLEST_CAPTIONED = 96  # minimum width of a captioned image, in pixels
FRAME_MS, LAST_FRAME_MS = 400, 2000


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Rounds (..., 3, H, W) in [0, 1] to (..., H, W, 3) uint8 in [0, 255]."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Arranges images (n, 3, H, W) row by row on black; returns (3, rows (H + pad) + pad, columns (W + pad) + pad)."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    grid = images.new_zeros(channels, rows * (height + PADDING) + PADDING, columns * (width + PADDING) + PADDING)
    for i, image in enumerate(images):
        top = PADDING + (i // columns) * (height + PADDING)
        left = PADDING + (i % columns) * (width + PADDING)
        grid[:, top : top + height, left : left + width] = image
    return grid


def picture_grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arranges pictures of one size and any mode in an RGB grid; see `image_grid`."""
    images = torch.stack([to_tensor(picture.convert("RGB")) for picture in pictures]) / 2 + 0.5
    return Image.fromarray(to_uint8(image_grid(images, columns)))


def formation_strip(steps: Iterable[Tensor]) -> Tensor:
    """Arranges the images (b, 3, H, W) in [0, 1] after each scale: one row per image, one column per scale."""
    images = torch.stack([*steps], dim=1)  # (b, k, 3, H, W)
    return image_grid(images.flatten(0, 1), columns=images.shape[1])


def with_row_names(grid: Tensor, names: Sequence[str]) -> Tensor:
    """Adds the name of each row, cut to `LONGEST_NAME`, at the left of a grid (3, H, W) of equally high rows."""
    height = grid.shape[1] // len(names)
    font = ImageFont.load_default(min(max(height // 4, SMALLEST_FONT), LARGEST_FONT))
    names = [shorten(name, font, LONGEST_NAME) for name in names]
    width = round(max(font.getlength(name) for name in names)) + 2 * PADDING
    margin = Image.new("RGB", (width, grid.shape[1]))
    draw = ImageDraw.Draw(margin)
    for row, name in enumerate(names):
        draw.text((width - PADDING, (row + 0.5) * grid.shape[1] / len(names)), name, "white", font, anchor="rm")
    pixels = torch.from_numpy(np.array(margin)).movedim(-1, 0).to(grid) / 255
    return torch.cat([pixels, grid], dim=2)


def captioned_pair(original: Tensor | None, reconstruction: Tensor, *captions: str) -> Tensor:
    """Stacks an original above its reconstruction, both (3, H, W), under captions: a figure (3, H', W').

    An unavailable original is gray. Each caption is one line, cut to the width; small images are magnified, so that
    the captions are legible.
    """
    original = torch.full_like(reconstruction, 0.5) if original is None else original
    times = -(-SMALLEST_CAPTIONED // reconstruction.shape[-1])
    pair = (
        image_grid(torch.stack([original, reconstruction]), 1).repeat_interleave(times, 1).repeat_interleave(times, 2)
    )
    font = ImageFont.load_default(SMALLEST_FONT)
    line = SMALLEST_FONT + 2 * PADDING
    header = Image.new("RGB", (pair.shape[2], line * len(captions)))
    draw = ImageDraw.Draw(header)
    for row, caption in enumerate(captions):
        draw.text((header.width / 2, (row + 0.5) * line), shorten(caption, font, header.width), "white", font, "mm")
    pixels = torch.from_numpy(np.array(header)).movedim(-1, 0).to(pair) / 255
    return torch.cat([pixels, pair], dim=1)


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Puts a text on one line and cuts its beginning if it is too wide, because the end of a path is most telling."""
    text = " ".join(text.split())
    if len(text) <= width and font.getlength(text) <= width:
        return text
    text = text[-int(width) :]  # a character is at least one pixel wide, and measuring takes linear time
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def save_image(image: Tensor, path: str | Path) -> None:
    """Writes an image (3, H, W) in [0, 1] as a PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(to_uint8(image)).save(temporary, format="PNG")


def save_animation(frames: Sequence[Tensor], path: str | Path) -> None:
    """Writes frames (3, H, W) in [0, 1] as a GIF or WebP that repeats, atomically."""
    first, *others = [Image.fromarray(to_uint8(frame)) for frame in frames]
    durations = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    with atomic_path(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=durations, loop=0, lossless=True)
