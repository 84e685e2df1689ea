"""Scores of reconstructions against their originals: PSNR, SSIM, and the Frechet distance between the two sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_mvar.devices import exact_float32
from lightning_mvar.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_mvar.metrics.summary import num_features


class ReconstructionScores:
    """Accumulates image pairs in bounded memory and scores them over all ranks.

    Args:
        extractor: prepared, on `device`; None to skip the Frechet distance.
        device: device to compute on.
    """

    def __init__(self, extractor: nn.Module | None, device: torch.device) -> None:
        self.extractor = extractor
        features = 0 if extractor is None else num_features(extractor)
        self.originals, self.decoded = (FeatureStatistics(features).to(device) for _ in range(2))
        self.psnr, self.ssim = (
            MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(device) for _ in range(2)
        )

    @torch.no_grad()
    def update(self, originals: Tensor, decoded: Tensor) -> None:
        """Adds pairs of images (b, 3, H, W) float32 in [0, 1], b at least 1."""
        self.psnr.update(-10 * (originals - decoded).square().mean(dim=(1, 2, 3)).log10().double())
        ssim = structural_similarity_index_measure(decoded, originals, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        self.ssim.update(ssim.double())
        if self.extractor is not None:
            with exact_float32():
                self.originals.update(self.extractor(originals))
                self.decoded.update(self.extractor(decoded))

    def compute(self) -> dict[str, float]:
        """Returns `psnr` in dB, `ssim` and, with an extractor, `rfid` (needs two pairs); all ranks must call this."""
        scores = {"psnr": float(self.psnr.compute()), "ssim": float(self.ssim.compute())}
        if self.extractor is not None:
            scores["rfid"] = frechet_distance(self.originals.compute(), self.decoded.compute())
        return scores
