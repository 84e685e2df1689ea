"""The embedded digits: scikit-learn's 1,797 scans of handwritten digits in 10 classes."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_mvar.data.builtin.base import RESOLUTION, EmbeddedSet, Split, check_split
from lightning_mvar.errors import require_package

TRAIN_SHARE = 0.75  # of all digits, and of the training digits for subtrain
SPLIT_SEED = 0
MARGIN = 1  # maximum shift of a random crop, in pixels of 32; after shifts of 2, a classifier misreads some digits


@cache
def load_digits(split: Split) -> tuple[Tensor, Tensor]:
    """Returns images (n, 3, 32, 32) float32 in [-1, 1], bright ink on dark, and labels (n,) int64.

    The scans are 8 x 8 with 17 gray levels, enlarged bicubically. The splits are fixed and stratified by class: 1,347
    train and 450 test. The training digits are divided again into 1,010 subtrain and 337 validation, for choosing
    settings.

    Raises:
        InputError: if the split does not exist or scikit-learn is not installed.
    """
    check_split("digits", split, get_args(Split))
    require_package("sklearn", "demo", f"digits:{split}")
    from sklearn.datasets import load_digits as load_scans

    scans = load_scans()
    chosen = np.sort(split_indices(scans.target)[split])
    gray = torch.tensor(scans.images[chosen] / 16.0, dtype=torch.float32)[:, None]  # (n, 1, 8, 8) in [0, 1]
    large = F.interpolate(gray, size=(RESOLUTION, RESOLUTION), mode="bicubic").clamp(0, 1)
    return large.expand(-1, 3, -1, -1) * 2 - 1, torch.tensor(scans.target[chosen], dtype=torch.int64)


def split_indices(labels: NDArray[np.int64]) -> dict[Split, NDArray[np.int64]]:
    """Returns the indices of each split, unsorted, for the labels (n,) of all digits."""
    from sklearn.model_selection import train_test_split

    settings: dict[str, Any] = {"train_size": TRAIN_SHARE, "random_state": SPLIT_SEED}
    train, test = train_test_split(np.arange(len(labels)), stratify=labels, **settings)
    subtrain, validation = train_test_split(train, stratify=labels[train], **settings)
    return {"train": train, "test": test, "subtrain": subtrain, "validation": validation}


@cache
def load_digits_with_margin(split: Split) -> tuple[Tensor, Tensor]:
    """Returns images (n, 3, 34, 34) with a margin that repeats the edge pixels, and labels (n,)."""
    images, labels = load_digits(split)
    return F.pad(images, (MARGIN,) * 4, mode="replicate"), labels


DIGITS = EmbeddedSet("digits", tuple(map(str, range(10))), MARGIN, load_digits_with_margin)
