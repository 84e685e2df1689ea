"""Perturbed reconstruction FID (pFID, arXiv 2503.08354): the distance of images decoded from partly wrong tokens.

Generators sample wrong but plausible tokens. With a decoder that tolerates them, generated images are better than the
tokenizer's rFID suggests. A random share of each image's tokens, over all scales, is replaced by uniform draws from the
codes nearest to the token's own (including itself), as in the published code; the image is decoded without re-encoding.
Unlike there, neighbors are those of the code, not of the encoder's output, and the grid of settings is this project's,
so values are comparable with each other but not with published ones.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor, nn

from lightning_mvar.devices import exact_float32
from lightning_mvar.metrics.frechet import FeatureStatistics, Statistics, frechet_distance
from lightning_mvar.metrics.summary import num_features
from lightning_mvar.sampling.philox import CORRUPTION, image_keys, uniform
from lightning_mvar.tokenizer.tokenizer import Tokenizer

SHARES = (0.5, 0.7, 0.9)  # of the tokens
CODES = (1 / 64, 1 / 32, 1 / 16)  # codes to draw from, as a fraction of the codebook
BLOCK_ROWS = 1024
SEED = 0


class PerturbedScores:
    """Decodes perturbed tokens in all nine settings and accumulates the features.

    The perturbation of image i does not depend on the batch size or the device.

    Args:
        tokenizer: in eval mode, on the device to compute on.
        extractor: prepared, on the same device.
    """

    def __init__(self, tokenizer: Tokenizer, extractor: nn.Module) -> None:
        self.tokenizer, self.extractor, self.count = tokenizer, extractor, 0
        codebook = tokenizer.quantizer.codebook.weight.detach()
        self.neighbors = nearest_codes(codebook, max(2, math.ceil(max(CODES) * len(codebook))))
        self.statistics = [
            FeatureStatistics(num_features(extractor)).to(codebook.device) for _ in product(SHARES, CODES)
        ]

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Adds the images of tokens (b, l) int64."""
        keys = image_keys(SEED, range(self.count, self.count + len(tokens))).to(tokens.device)
        self.count += len(tokens)
        for setting, (share, codes) in enumerate(product(SHARES, CODES)):
            nearest = self.neighbors[:, : max(2, math.ceil(codes * len(self.neighbors)))]
            images = (self.tokenizer.decode(perturb(tokens, nearest, share, keys, setting)) + 1) / 2
            with exact_float32():
                self.statistics[setting].update(self.extractor(images))

    def compute(self, originals: Statistics) -> float:
        """Returns the mean distance to the originals over all settings."""
        distances = [frechet_distance(originals, statistics.compute()) for statistics in self.statistics]
        return sum(distances) / len(distances)


def nearest_codes(codebook: Tensor, count: int) -> Tensor:
    """Returns the indices (v, count) of the codes nearest to each code (v, c) in L2, itself first."""
    blocks = (torch.cdist(rows, codebook).topk(count, largest=False).indices for rows in codebook.split(BLOCK_ROWS))
    return torch.cat([*blocks])


def perturb(tokens: Tensor, nearest: Tensor, share: float, keys: Tensor, setting: int) -> Tensor:
    """Replaces each token with probability `share` by a uniform draw from the codes nearest to its own.

    Args:
        tokens: (b, l) int64.
        nearest: (v, k) the codes to draw from, for each code.
        share: expected share of the tokens that are redrawn; some draws return the token itself.
        keys: (b, 2) int64 key of each image's random numbers.
        setting: index of the setting; each has its own random numbers.
    """
    replaced, choice = (uniform(keys, 2 * setting + i, tokens.shape[1], CORRUPTION) for i in range(2))
    drawn = nearest[tokens, (choice * nearest.shape[1]).long()]
    return torch.where(replaced < share, drawn, tokens)
