"""Positions of tokens on the map of their scale: neighborhoods, and the orders in which a scan can read them.

Shapes: l tokens of all scales together; `shapes` gives (height, width) of each scale, packed in raster order.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lightning_mvar.scales import Shape


@cache
def reading_order(shapes: tuple[Shape, ...], order: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Returns the order in which a scan reads the tokens of each scale; the order of scales is unchanged.

    Args:
        shapes: height and width of each scale.
        order: `raster` (row by row, as tokens are packed; returns None), `column` (column by column, top to bottom) or
            `reversed` (raster backwards).
        device: device of the results.

    Returns:
        (l,) int64 packed position of the i-th token that the scan reads, and its inverse.
    """
    if order == "raster" or set(shapes) == {(1, 1)}:
        return None
    positions, start = [], 0
    with torch.inference_mode(False):  # validation may fill the cache, and training reuses the tensor
        for shape in shapes:
            scale = torch.arange(start, start + math.prod(shape), device=device)
            positions.append(scale.flip(0) if order == "reversed" else scale.view(shape).T.flatten())
            start += len(scale)
        forwards = torch.cat(positions)
        return forwards, forwards.argsort()


@cache
def neighborhood(shapes: tuple[Shape, ...], window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the tokens in the window x window square around each token, on the map of its own scale.

    Args:
        shapes: height and width of each scale.
        window: side of the square, odd.
        device: device of the results.

    Returns:
        (l, window ** 2) int64 packed positions, clamped to the map, and (l, window ** 2) bool, False for positions
        outside the map.
    """
    reach = torch.arange(window) - window // 2
    rows, columns = (t.flatten() for t in torch.meshgrid(reach, reach, indexing="ij"))
    positions, inside, start = [], [], 0
    with torch.inference_mode(False):
        for height, width in shapes:
            token = torch.arange(height * width)[:, None]
            row, column = token // width + rows, token % width + columns
            inside.append((row >= 0) & (row < height) & (column >= 0) & (column < width))
            positions.append(start + row.clamp(0, height - 1) * width + column.clamp(0, width - 1))
            start += height * width
        return torch.cat(positions).to(device), torch.cat(inside).to(device)


@cache
def window_mask(shape: Shape, window: int, device: torch.device) -> Tensor:
    """Returns (l, l) bool for a map of this (height, width): whether token j is in the window around token i."""
    with torch.inference_mode(False):
        tokens = torch.arange(math.prod(shape), device=device)
        near = [
            (t[:, None] - t).abs() <= window // 2
            for t in (tokens.div(shape[1], rounding_mode="floor"), tokens % shape[1])
        ]
        return near[0] & near[1]
