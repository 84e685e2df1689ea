"""Detects from pixels how samples were processed: JPEG compression, resizing, and rounding down.

JPEG rounds the DCT coefficients of 8 x 8 blocks. Most high-frequency coefficients are then zero on its grid of blocks,
but not on a grid that is shifted by half a block. Blurred or resized images have few nonzero ones on any grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.analysis.doctor.differences import Result
from lightning_mvar.data.images.examples import spaced_evenly
from lightning_mvar.sampling.readers import Samples

MAX_IMAGES = 500  # inspected per set, evenly spaced
BLOCK = 8  # side of a JPEG block in pixels
MIN_SIDE = 2 * BLOCK  # of inspected images, in pixels
ZERO = 0.6  # coefficients with a smaller magnitude are zero up to the rounding of pixels
# Least drop in the share of nonzero fine coefficients on the JPEG grid. The drop is at most 0.2 for resized images and
# above 0.3 for JPEG of quality up to 95.
MIN_JPEG_LOSS = 0.25
MIN_SHARPNESS = 0.8  # sharpness of the blurrier of two sets relative to the other, below which they differ
LUMINANCE = np.array([0.299, 0.587, 0.114])
FREQUENCIES = np.arange(BLOCK)
DCT = np.cos(np.pi * (2 * FREQUENCIES + 1) * FREQUENCIES[:, None] / (2 * BLOCK)) / 2
DCT[0] /= np.sqrt(2)
FINE = FREQUENCIES + FREQUENCIES[:, None] >= BLOCK

Pixels = NDArray[np.uint8]  # (n, H, W, 3)


def add_traces(first: Result, second: Result, samples: Sequence[Samples | None]) -> None:
    """Adds findings from the pixels of their samples to two results; samples that are not available are None."""
    images = [None if found is None or min(found.shape) < MIN_SIDE else read_some(found) for found in samples]
    for result, pixels in zip((first, second), images, strict=True):
        if pixels is not None and fine_share(pixels, BLOCK // 2) - fine_share(pixels) > MIN_JPEG_LOSS:
            result["compression_traces"] = "traces of JPEG"
    ours, theirs = images
    if ours is None or theirs is None or ours.shape[1:] != theirs.shape[1:]:
        return
    sharpness = sharpness_of(ours), sharpness_of(theirs)
    if min(sharpness) < MIN_SHARPNESS * max(sharpness):
        first["sharpness"], second["sharpness"] = (round(value, 3) for value in sharpness)
    if len(ours) == len(theirs) and (darker := cut_off(ours, theirs)) is not None:
        first["rounding"], second["rounding"] = ("down", "nearest") if darker == 0 else ("nearest", "down")


def read_some(samples: Samples) -> Pixels:
    """Reads up to `MAX_IMAGES` images, evenly spaced."""
    return np.stack([samples.pixels(i) for i in spaced_evenly(len(samples), MAX_IMAGES).tolist()])


def fine_share(pixels: Pixels, offset: int = 0) -> float:
    """Returns the share of fine DCT coefficients that are not zero, for blocks that begin at pixel `offset`."""
    rows, columns = ((side - offset) // BLOCK for side in pixels.shape[1:3])
    shares = []
    for image in pixels:  # one by one, because the float64 coefficients take 8 times the memory
        gray = image[offset : offset + rows * BLOCK, offset : offset + columns * BLOCK] @ LUMINANCE
        blocks = gray.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)
        shares.append((np.abs(DCT @ blocks @ DCT.T)[..., FINE] >= ZERO).mean())
    return float(np.mean(shares))


def sharpness_of(pixels: Pixels) -> float:
    """Returns the share of fine coefficients that are not zero, averaged over both grids: resizing may favor one."""
    return (fine_share(pixels) + fine_share(pixels, BLOCK // 2)) / 2


def cut_off(first: Pixels, second: Pixels) -> int | None:
    """Returns which of two sets (0 or 1) holds the other's images rounded down instead of to nearest, None if neither.

    Rounding down makes some pixels darker by one gray level and none brighter.
    """
    steps = second.astype(np.int16) - first
    if not steps.any() or np.abs(steps).max() > 1 or {-1, 1} <= set(np.unique(steps)):
        return None
    return int(steps.min() == -1)
