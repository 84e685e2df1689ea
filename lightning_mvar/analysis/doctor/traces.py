"""What the pixels of samples tell of their processing: JPEG, resizing, and decimals that were cut off.

JPEG rounds the DCT coefficients of 8 x 8 blocks. On its grid of blocks most fine ones are then zero, but not on a grid
that is shifted by half a block. Blurred or resized images have few fine coefficients on any grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_mvar.analysis.doctor.differences import Result
from lightning_mvar.data.images.examples import spaced_evenly
from lightning_mvar.sampling.readers import Samples

MAX_IMAGES = 500  # looked at, evenly spaced over a set
BLOCK = 8  # side of a JPEG block
MIN_SIDE = 2 * BLOCK  # of images that are looked at
ZERO = 0.6  # coefficients below it are zero up to the rounding of pixels
MIN_JPEG_LOSS = 0.25  # of the share of fine coefficients; up to 0.2 for resized images, above 0.3 for JPEG up to 95
MIN_SHARPNESS = 0.8  # of the blurrier of two sets, relative to the other
LUMINANCE = np.array([0.299, 0.587, 0.114])
FREQUENCIES = np.arange(BLOCK)
DCT = np.cos(np.pi * (2 * FREQUENCIES + 1) * FREQUENCIES[:, None] / (2 * BLOCK)) / 2
DCT[0] /= np.sqrt(2)
FINE = FREQUENCIES + FREQUENCIES[:, None] >= BLOCK

Pixels = NDArray[np.uint8]  # (n, H, W, 3)


def add_traces(first: Result, second: Result, samples: Sequence[Samples | None]) -> None:
    """Adds to two results what the pixels of their samples show; None for samples that are not at hand."""
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
    """Returns the share of fine DCT coefficients that are not zero, on the grid of blocks that begins at `offset`."""
    rows, columns = ((side - offset) // BLOCK for side in pixels.shape[1:3])
    shares = []
    for image in pixels:  # one by one: their coefficients are float64
        gray = image[offset : offset + rows * BLOCK, offset : offset + columns * BLOCK] @ LUMINANCE
        blocks = gray.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)
        shares.append((np.abs(DCT @ blocks @ DCT.T)[..., FINE] >= ZERO).mean())
    return float(np.mean(shares))


def sharpness_of(pixels: Pixels) -> float:
    """Returns the share of fine coefficients that are not zero, over both grids: resizing may favour one of them."""
    return (fine_share(pixels) + fine_share(pixels, BLOCK // 2)) / 2


def cut_off(first: Pixels, second: Pixels) -> int | None:
    """Returns which of two sets has the other's images with decimals cut off instead of rounded: 0, 1 or None.

    Cutting off makes some pixels darker by one level and none brighter.
    """
    steps = second.astype(np.int16) - first
    if not steps.any() or np.abs(steps).max() > 1 or {-1, 1} <= set(np.unique(steps)):
        return None
    return int(steps.min() == -1)
