"""Inception Score of a set of images (IS, arXiv 1606.03498).

    exp(E_x KL(p(y|x) || p(y)))

is computed in each of several splits of the set; the score is the mean over the splits, with their standard deviation
beside it. With m the mean of p over a split, E_x KL = E_x sum_y p log p - sum_y m log m, so sums suffice. The value
depends on the classifier and on the number of images: only 50000 images, InceptionV3's logits and 10 splits are
comparable to published scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mvar.errors import InputError


class InceptionScore(Metric):
    """Accumulates logits into the score, exactly and over all ranks: the float64 sums of each split add up.

    Args:
        num_classes: of the classifier.
        num_samples: images in the set, over all ranks; each is to be handed in once.
        splits: parts of the set, equal to within one image.
        seed: of the permutation that puts images into splits.

    Raises:
        InputError: if a split would be empty.
    """

    full_state_update = False

    def __init__(self, num_classes: int, num_samples: int, splits: int = 10, seed: int = 0) -> None:
        if not 1 <= splits <= num_samples:
            raise InputError(f"an Inception Score over {splits} splits needs as many images, got {num_samples}")
        super().__init__()
        self.total: Tensor
        self.negentropy: Tensor
        self.n: Tensor
        self.split: Tensor
        self.add_state("total", torch.zeros(splits, num_classes), dist_reduce_fx="sum")
        self.add_state("negentropy", torch.zeros(splits), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros(splits), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)
        # Images come sorted by class or with the classes in turn, so a run of them is no fair sample of the set.
        # torchmetrics permutes them as they came, by the global generator; image numbers and a seed of its own give
        # the same splits on every rank, in any order and batch size. A buffer is no state: no rank adds it to
        # another's. Registered after set_dtype, it stays an integer.
        place = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("split", place * splits // num_samples, persistent=False)

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Logits (b, num_classes) of the images numbered `indices` (b,) int64 in [0, num_samples)."""
        p = logits.double().softmax(dim=1)
        split = self.split[indices]
        self.total.index_add_(0, split, p)
        self.negentropy.index_add_(0, split, -torch.special.entr(p).sum(dim=1))  # entr(0) = 0, where log(0) is not
        self.n += split.bincount(minlength=len(self.n))

    def compute(self) -> tuple[float, float]:
        """Mean and population standard deviation over the splits, each of which needs an image."""
        marginal = self.total / self.n[:, None]
        scores = (self.negentropy / self.n + torch.special.entr(marginal).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))
