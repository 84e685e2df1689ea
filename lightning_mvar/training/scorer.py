"""Training of a scorer of drafts on real and drawn pyramids.

Shapes: b images, l tokens, k scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count, islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_mvar.data.tokens.stream import PairedStream, TokenRows, TokenStream
from lightning_mvar.devices import device_of
from lightning_mvar.sampling.scorer import Scorer
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer

WEIGHT_DECAY = 0.05
WARMUP = 0.05  # share of the steps


def train(
    scorer: Scorer,
    quantizer: ResidualQuantizer,
    batches: PairedStream,
    steps: int,
    lr: float,
    on_step: Callable[[float], object],
) -> None:
    """Minimizes the binary cross entropy of real against drawn pyramids, averaged over their scales.

    Args:
        scorer: the scorer; its device, which it shares with the quantizer, is used.
        quantizer: quantizer of the pyramids.
        batches: batches that are half real and half drawn.
        steps: number of optimizer steps.
        lr: peak learning rate of AdamW, see `lr_factor`.
        on_step: called with the loss of each step.
    """
    optimizer = torch.optim.AdamW(scorer.parameters(), lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps))
    scorer.train()
    for rows in islice(endless(batches), steps):
        assert rows.own is not None
        drawn = torch.from_numpy(rows.own).to(device_of(scorer))
        scores = score_scales(scorer, quantizer, rows.tokens, rows.labels)  # (b, k)
        loss = F.softplus(torch.where(drawn[:, None], scores, -scores)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(loss.item())
    scorer.eval()


def lr_factor(progress: float) -> float:
    """Returns the learning rate relative to its peak: linear warm-up, then a cosine to 0."""
    return min(1.0, (progress + 0.01) / WARMUP) * (1 + math.cos(math.pi * progress)) / 2


def endless(batches: PairedStream) -> Iterator[TokenRows]:
    """Yields the batches of all epochs, without end."""
    for epoch in count():
        batches.epoch = epoch
        yield from batches


def score_scales(
    scorer: Scorer, quantizer: ResidualQuantizer, tokens: NDArray[np.uint16], labels: NDArray[np.int64]
) -> Tensor:
    """Returns scores (b, k) of images after each scale, given their tokens (b, l) and labels (b,)."""
    device = device_of(scorer)
    with torch.no_grad():
        f_hats = [*quantizer.f_hats(torch.from_numpy(tokens.astype(np.int64)).to(device))]
    classes = torch.from_numpy(labels).to(device)
    return torch.stack([scorer(f_hat, classes, k) for k, f_hat in enumerate(f_hats)], dim=1)


@torch.no_grad()
def separation(scorer: Scorer, quantizer: ResidualQuantizer, real: TokenStream, drawn: TokenStream) -> Tensor:
    """Returns, for each scale (k,), the probability that a real pyramid scores higher than a drawn one (AUC).

    Ties count half. It is 0.5 if the scorer cannot tell them apart, so that a choice has no effect, and 1 if it always
    can.

    Args:
        scorer: in eval mode.
        quantizer: quantizer of the pyramids.
        real: pyramids of real images.
        drawn: pyramids that a network drew.
    """
    real_scores, drawn_scores = (  # (n, k), (m, k)
        torch.cat([score_scales(scorer, quantizer, rows.tokens, rows.labels)[rows.valid] for rows in stream])
        for stream in (real, drawn)
    )
    ordered = drawn_scores.T.sort().values.contiguous()  # (k, m)
    values = real_scores.T.contiguous()  # (k, n)
    lower, not_higher = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (lower + not_higher).double().mean(dim=1) / (2 * len(drawn_scores))
