"""Where tokens of a scale lie on its map: their neighbours, and the orders in which a scan can read them.

Shapes: l tokens of the scales in `lengths`, each of which is a square map in raster order.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def reading_order(lengths: tuple[int, ...], order: str, device: torch.device) -> Tensor | None:
    """(l,) int64: the packed position of the i-th token that a scan reads. Scales stay in their order.

    Args:
        lengths: tokens of each scale.
        order: `raster` (rows, left to right: as tokens are packed, for which None is returned), `column` (columns, top
            to bottom) or `reversed` (raster backwards).
        device: of the result.
    """
    if order == "raster" or max(lengths) == 1:
        return None
    positions, begin = [], 0
    with torch.inference_mode(False):  # a validation may be the first to ask, and training goes on with the answer
        for length in lengths:
            scale = torch.arange(begin, begin + length, device=device)
            side = math.isqrt(length)
            positions.append(scale.flip(0) if order == "reversed" else scale.view(side, side).T.flatten())
            begin += length
        return torch.cat(positions)


@cache
def neighbourhood(lengths: tuple[int, ...], window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens in a window x window square around each, on the map of its own scale.

    Args:
        lengths: tokens of each scale.
        window: side of the square, odd.
        device: of the results.

    Returns:
        (l, window ** 2) int64 packed positions, and (l, window ** 2) bool: whether the map reaches that far. Where it
        does not, the position is some other of the map.
    """
    reach = torch.arange(window) - window // 2
    rows, columns = (t.flatten() for t in torch.meshgrid(reach, reach, indexing="ij"))
    positions, inside, begin = [], [], 0
    with torch.inference_mode(False):
        for length in lengths:
            side, token = math.isqrt(length), torch.arange(length)[:, None]
            row, column = token // side + rows, token % side + columns
            inside.append((row >= 0) & (row < side) & (column >= 0) & (column < side))
            positions.append(begin + row.clamp(0, side - 1) * side + column.clamp(0, side - 1))
            begin += length
        return torch.cat(positions).to(device), torch.cat(inside).to(device)
