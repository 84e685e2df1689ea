"""Inception score of an image set (IS, arXiv 1606.03498).

    exp(E_x KL(p(y|x) || p(y)))

is computed for each split of the set; the score is the mean over the splits, reported with the standard deviation. With
m the mean of p over a split, E_x KL = E_x sum_y p log p - sum_y m log m, so running sums suffice. The value depends on
the classifier and on the number of images: only 50,000 images, InceptionV3 logits and 10 splits are comparable to
published scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mvar.errors import InputError


class InceptionScore(Metric):
    """Accumulates logits into the score, as float64 sums per split that are added over all ranks.

    Args:
        num_classes: number of classes of the classifier.
        num_samples: images in the set, over all ranks; each must be passed once.
        splits: number of splits; their sizes differ by at most one image.
        seed: seed of the permutation that assigns images to splits.
        options: of torchmetrics, such as `sync_on_compute=False` for the score of this rank only.

    Raises:
        InputError: if a split would be empty.
    """

    full_state_update = False

    def __init__(self, num_classes: int, num_samples: int, splits: int = 10, seed: int = 0, **options: Any) -> None:
        if not 1 <= splits <= num_samples:
            raise InputError(
                f"an inception score needs 1 <= splits <= images, got {splits} splits and {num_samples} images"
            )
        super().__init__(**options)
        self.total: Tensor
        self.negentropy: Tensor
        self.n: Tensor
        self.split: Tensor
        self.add_state("total", torch.zeros(splits, num_classes), dist_reduce_fx="sum")
        self.add_state("negentropy", torch.zeros(splits), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros(splits), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)
        # Images are sorted by class or cycle through the classes, so consecutive images do not represent the set.
        # torchmetrics permutes them in order of arrival with the global generator. A permutation of image indices
        # with its own seed gives the same splits on every rank, for any order and batch size. It is a buffer, not a
        # metric state, because ranks must not sum it; registered after set_dtype, it keeps its integer dtype.
        permutation = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("split", permutation * splits // num_samples, persistent=False)

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Adds logits (b, num_classes) of the images with `indices` (b,) int64 in [0, num_samples)."""
        p = logits.double().softmax(dim=1)
        split = self.split[indices]
        self.total.index_add_(0, split, p)
        self.negentropy.index_add_(0, split, -torch.special.entr(p).sum(dim=1))  # entr(0) = 0, but log(0) is infinite
        self.n += split.bincount(minlength=len(self.n))

    def compute(self) -> tuple[float, float]:
        """Returns mean and population standard deviation over the splits; NaN if a split has no image."""
        marginal = self.total / self.n[:, None]
        scores = (self.negentropy / self.n + torch.special.entr(marginal).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))
