"""Tokens that training reveals, so that sampling can draw a scale in several steps (MaskGIT, arXiv 2202.04200).

A step of sampling predicts the hidden tokens of a scale from its revealed ones. Training shows the network both cases:
half of the scales with all tokens hidden, as in the first step, the others at a random point of the later steps. What
finer scales read of a scale is, in training as in sampling, the state of a pass in which a part of it was revealed:
none with one step, else all tokens but the last step's. So training covers all numbers of steps, but sampling always
carries the state of the last step, where training carries that of a random one.

Shapes: b images, l tokens of all scales, k scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mvar.sampling.philox import TOKENS, uniform
from lightning_mvar.scales import ScaleSchedule

ALL_HIDDEN = 0.5  # share of scales in which nothing is revealed
# Expected share of hidden tokens: the mean of the cosine is 2 / pi.
HIDDEN = ALL_HIDDEN + (1 - ALL_HIDDEN) * 2 / math.pi
TOKEN, SCALE = range(2)  # rows of the random numbers of an image


def draw_revealed(keys: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Draws which tokens to reveal, independently for each scale of each image.

    Of a scale that is not all hidden, each token is revealed with the share that `sampling.masked.Kept.more` keeps at
    a point of the steps drawn uniformly: 1 - cos(pi / 2 * u) with u uniform in [0, 1).

    Args:
        keys: (b, 2) int64 key of each image's random numbers.
        schedule: the scales.

    Returns:
        (b, l) bool.
    """
    rows = torch.arange(2, device=keys.device)[:, None]
    draws = uniform(keys, rows, schedule.num_tokens, TOKENS)  # (b, 2, l)
    progress = (draws[:, SCALE, : schedule.num_scales] - ALL_HIDDEN).clamp(min=0) / (1 - ALL_HIDDEN)  # (b, k)
    shares = 1 - torch.cos(math.pi / 2 * progress)
    by_token = [share.expand(-1, n) for share, n in zip(shares.split(1, dim=1), schedule.lengths, strict=True)]
    return draws[:, TOKEN] < torch.cat(by_token, dim=1)  # (b, l)
