"""The embedded images: scikit-learn's 1,797 scans of handwritten digits, 10 classes, no download."""

from __future__ import annotations

from functools import cache
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.data.builtin.base import RESOLUTION, EmbeddedSet, Split, check_split
from lightning_mvar.errors import InputError

TRAIN_SHARE = 0.75
SPLIT_SEED = 0
MARGIN = 1  # pixels of 32 that a random crop moves a digit by; by 2, a classifier of real digits begins to misread them


@cache
def load_digits(split: Split) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) float32 in [-1, 1], ink bright on dark, and labels (n,) int64.

    The scans are 8 x 8 with 17 grey levels; they are enlarged bicubically. The split is fixed, stratified by class:
    1,347 train, 450 test.
    """
    check_split("digits", split)
    try:
        from sklearn.datasets import load_digits as load_scans
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("the digits need scikit-learn: pip install 'lightning-mvar[demo]'") from error
    scans = load_scans()
    everything = np.arange(len(scans.target))
    parts = train_test_split(everything, train_size=TRAIN_SHARE, stratify=scans.target, random_state=SPLIT_SEED)
    chosen = np.sort(parts[get_args(Split).index(split)])
    grey = torch.tensor(scans.images[chosen] / 16.0, dtype=torch.float32)[:, None]  # (n, 1, 8, 8) in [0, 1]
    large = F.interpolate(grey, size=(RESOLUTION, RESOLUTION), mode="bicubic").clamp(0, 1)
    return large.expand(-1, 3, -1, -1) * 2 - 1, torch.tensor(scans.target[chosen], dtype=torch.int64)


@cache
def load_wide_digits(split: Split) -> tuple[Tensor, Tensor]:
    """The same with a margin, which repeats their edges: images (n, 3, 34, 34), labels (n,)."""
    images, labels = load_digits(split)
    return F.pad(images, (MARGIN,) * 4, mode="replicate"), labels


DIGITS = EmbeddedSet("digits", tuple(map(str, range(10))), MARGIN, load_wide_digits)
