"""Residual quantization over a pyramid of scales (VAR, arXiv 2404.02905, section 3.1, algorithms 1 and 2).

| paper / published code      | here         | meaning                                                       |
|-----------------------------|--------------|---------------------------------------------------------------|
| Z, embedding                | codebook     | (v, c) code vectors, shared by all scales                     |
| f, f_BChw                   | features     | (b, c, s, t) encoder output; s x t is the last token map      |
| f_hat                       | f_hat        | (b, c, s, t) sum of the contributions of the scales so far    |
| f_rest                      | residual     | features - f_hat                                              |
| phi_k, quant_resi           | phi          | convolutions after upsampling, shared by neighboring scales  |
| r_k, idx_Bl                 | tokens       | (b, l) indices into the codebook, all scales packed           |

Tokenizing, teacher forcing, decoding and sampling all use `accumulate`, the residual step "upsample the code map, phi,
add", and therefore agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.devices import exact_float32, without_autocast
from lightning_mvar.scales import ScaleSchedule, Shape

PHI_RATIO = 0.5
PUBLISHED_PHI = 4  # the published tokenizer places its four phi at linspace(1/12, 11/12, 4)


class PyramidStep(NamedTuple):
    """Result of quantizing one scale of n tokens."""

    queries: Tensor  # (b, n, c) residual at this scale
    tokens: Tensor  # (b, n) int64, nearest code per query
    f_hat: Tensor  # (b, c, s, t) including this scale


class Phi(nn.Conv2d):
    """Mean of the feature map and its 3 x 3 convolution."""

    def __init__(self, code_dim: int) -> None:
        super().__init__(code_dim, code_dim, kernel_size=3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return (1 - PHI_RATIO) * h + PHI_RATIO * super().forward(h)


class ResidualQuantizer(nn.Module):
    """Codebook and phi convolutions that quantize features over a pyramid of scales.

    Args:
        schedule: scales of the pyramid.
        vocab_size: v, size of the codebook.
        code_dim: c, channels per code.
        num_phi: number of phi convolutions; scale k uses the one whose position is nearest to k / (K - 1).
    """

    def __init__(self, schedule: ScaleSchedule, vocab_size: int, code_dim: int, num_phi: int) -> None:
        super().__init__()
        self.schedule = schedule
        self.codebook = nn.Embedding(vocab_size, code_dim)
        nn.init.uniform_(self.codebook.weight, -1 / vocab_size, 1 / vocab_size)
        self.phi = nn.ModuleList(Phi(code_dim) for _ in range(num_phi))
        margin = 1 / 12 if num_phi == PUBLISHED_PHI else 1 / (2 * num_phi)
        positions = np.linspace(margin, 1 - margin, num_phi)
        self.phi_of_scale = [int(np.abs(positions - schedule.ratio(k)).argmin()) for k in range(schedule.num_scales)]

    @property
    def shape(self) -> Shape:
        """Height and width of features and f_hat."""
        return self.schedule.shapes[-1]

    def empty(self, batch_size: int) -> Tensor:
        """Returns f_hat (b, c, s, t) before the first scale: zeros."""
        weight = self.codebook.weight
        return weight.new_zeros(batch_size, weight.shape[1], *self.shape)

    def accumulate(self, f_hat: Tensor, codes: Tensor, scale: int) -> Tensor:
        """Runs the residual step: adds the contribution of `codes` (b, n, c) of `scale` to f_hat (b, c, s, t)."""
        shape = self.schedule.shapes[scale]
        code_map = codes.transpose(1, 2).unflatten(2, shape)  # (b, c, height, width)
        if shape != self.shape:
            code_map = F.interpolate(code_map, size=self.shape, mode="bicubic")
        return f_hat + self.phi[self.phi_of_scale[scale]](code_map)

    def downsample(self, f: Tensor, scale: int) -> Tensor:
        """Averages `f` (b, c, s, t) to the map of `scale`; returns (b, n, c) in raster order."""
        shape = self.schedule.shapes[scale]
        if shape != self.shape:
            f = F.interpolate(f, size=shape, mode="area")
        return f.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def nearest(self, queries: Tensor) -> Tensor:
        """Finds the nearest code in L2, (b, n, c) -> (b, n) int64, in float32 because rounding changes the choice."""
        with without_autocast(queries), exact_float32():
            flat, codes = queries.flatten(0, 1).float(), self.codebook.weight.float()
            return squared_distances(flat, codes).argmin(dim=1).view(queries.shape[:2])

    def pyramid(self, features: Tensor) -> Iterator[PyramidStep]:
        """Quantizes `features` (b, c, s, t) scale by scale, each time the residual of the previous scales."""
        f_hat = self.empty(len(features))
        for k in range(self.schedule.num_scales):
            queries = self.downsample(features.detach() - f_hat.detach(), k)
            tokens = self.nearest(queries)
            f_hat = self.accumulate(f_hat, self.codebook(tokens), k)
            yield PyramidStep(queries, tokens, f_hat)

    def encode(self, features: Tensor) -> Tensor:
        """Encodes features (b, c, s, t) as tokens (b, l) int64."""
        return torch.cat([step.tokens for step in self.pyramid(features)], dim=1)

    def repairing_tokens(self, tokens: Tensor, true_f_hat: Tensor, f_hat: Tensor, scale: int) -> Tensor:
        """Returns the tokens of `scale` that best repair errors in the tokens of earlier scales.

        These are the codes nearest to the true codes plus the error of f_hat so far, averaged to the scale; without an
        error, they are the true tokens. This approximates quantizing the image's features minus f_hat, as if the
        features were exactly those that the true tokens encode.

        The sum of all true contributions would be no substitute for the features: quantizing it does not return its own
        tokens, because the contributions of its last scales are codes after phi.

        Args:
            tokens: (b, n) int64 true tokens of the scale.
            true_f_hat: (b, c, s, t) sum of the earlier scales with their true tokens.
            f_hat: (b, c, s, t) sum of the earlier scales with the tokens that replaced them.
            scale: index of the scale.

        Returns:
            (b, n) int64.
        """
        error = self.downsample(true_f_hat - f_hat, scale)
        repairing = self.nearest(self.codebook(tokens) + error)
        # The comparison matters if codes are equal: `nearest` returns the first of them.
        return torch.where((error == 0).all(dim=-1), tokens, repairing)

    def f_hats(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yields f_hat (b, c, s, t) of tokens (b, l) after each scale, coarse to fine."""
        f_hat = self.empty(len(tokens))
        for k, scale_tokens in enumerate(tokens.split(self.schedule.lengths, dim=1)):
            f_hat = self.accumulate(f_hat, self.codebook(scale_tokens), k)
            yield f_hat

    def decode(self, tokens: Tensor) -> Tensor:
        """Returns f_hat (b, c, s, t) of tokens (b, l) after all scales."""
        *_, f_hat = self.f_hats(tokens)
        return f_hat

    def scale_inputs(self, tokens: Tensor) -> Tensor:
        """Returns the network's teacher-forcing input (b, l - first, c) of tokens (b, l).

        The input of scale k + 1 is f_hat after scale k, averaged to the map of scale k + 1.
        """
        last = self.schedule.num_scales - 1
        inputs = [self.downsample(f_hat, k + 1) for k, f_hat in enumerate(self.f_hats(tokens)) if k < last]
        empty = self.codebook.weight.new_zeros(len(tokens), 0, self.codebook.embedding_dim)
        return torch.cat([empty, *inputs], dim=1)


def squared_distances(queries: Tensor, codes: Tensor) -> Tensor:
    """Returns the squared distances (n, v) of queries (n, c) to codes (v, c)."""
    return queries.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * queries @ codes.T
