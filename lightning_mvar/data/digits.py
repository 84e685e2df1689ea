"""The embedded images: scikit-learn's 1,797 scans of handwritten digits, 10 classes, no download."""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.errors import InputError

DigitsSplit = Literal["train", "test"]
TRAIN_SHARE = 0.75
SPLIT_SEED = 0
RESOLUTION = 32


@cache
def load_digits(split: DigitsSplit) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) float32 in [-1, 1], ink bright on dark, and labels (n,) int64.

    The scans are 8 x 8 with 17 grey levels; they are enlarged bicubically. The split is fixed, stratified by class:
    1,347 train, 450 test.
    """
    if split not in get_args(DigitsSplit):
        raise InputError(f"digits have the splits {' and '.join(get_args(DigitsSplit))}, not {split!r}")
    try:
        from sklearn.datasets import load_digits as load_scans
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("the digits need scikit-learn: pip install 'lightning-mvar[demo]'") from error
    scans = load_scans()
    everything = np.arange(len(scans.target))
    parts = train_test_split(everything, train_size=TRAIN_SHARE, stratify=scans.target, random_state=SPLIT_SEED)
    chosen = np.sort(parts[get_args(DigitsSplit).index(split)])
    grey = torch.tensor(scans.images[chosen] / 16.0, dtype=torch.float32)[:, None]  # (n, 1, 8, 8) in [0, 1]
    large = F.interpolate(grey, size=(RESOLUTION, RESOLUTION), mode="bicubic").clamp(0, 1)
    return large.expand(-1, 3, -1, -1) * 2 - 1, torch.tensor(scans.target[chosen], dtype=torch.int64)
