"""Where tokens of a scale lie on its map: their neighbours, and the orders in which a scan can read them.

Shapes: l tokens of the scales whose maps have the (height, width) in `shapes`, each in raster order.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lightning_mvar.scales import Shape


@cache
def reading_order(shapes: tuple[Shape, ...], order: str, device: torch.device) -> Tensor | None:
    """(l,) int64: the packed position of the i-th token that a scan reads. Scales stay in their order.

    Args:
        shapes: height and width of each scale.
        order: `raster` (rows, left to right: as tokens are packed, for which None is returned), `column` (columns, top
            to bottom) or `reversed` (raster backwards).
        device: of the result.
    """
    if order == "raster" or set(shapes) == {(1, 1)}:
        return None
    positions, begin = [], 0
    with torch.inference_mode(False):  # a validation may be the first to ask, and training goes on with the answer
        for shape in shapes:
            scale = torch.arange(begin, begin + math.prod(shape), device=device)
            positions.append(scale.flip(0) if order == "reversed" else scale.view(shape).T.flatten())
            begin += len(scale)
        return torch.cat(positions)


@cache
def neighbourhood(shapes: tuple[Shape, ...], window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens in a window x window square around each, on the map of its own scale.

    Args:
        shapes: height and width of each scale.
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
        for height, width in shapes:
            token = torch.arange(height * width)[:, None]
            row, column = token // width + rows, token % width + columns
            inside.append((row >= 0) & (row < height) & (column >= 0) & (column < width))
            positions.append(begin + row.clamp(0, height - 1) * width + column.clamp(0, width - 1))
            begin += height * width
        return torch.cat(positions).to(device), torch.cat(inside).to(device)
