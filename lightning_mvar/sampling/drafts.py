"""Choosing among drafts: several candidates of a scale, of which a scorer prefers one (LSRS, arXiv 2512.03796).

The tokens of a scale are drawn independently of each other, so they may not go together. The score of a candidate
estimates log p_real / p_drawn, up to a constant. So each is chosen with a probability proportional to exp(score), which
is sampling importance resampling: with a perfect scorer, the more candidates there are, the nearer the choice is to the
distribution of the real images. The paper takes the candidate of the highest score, which goes beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.sampling.philox import DRAFTS, uniform
from lightning_mvar.sampling.scorer import CONFIG, Scorer, load_scorer, read_config
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer


@dataclass(frozen=True)
class Drafts:
    """How many candidates of a scale are drawn, and what chooses among them; `SamplingSettings` checks the values.

    Args:
        count: candidates per scale; with 1, nothing is chosen.
        scorer: folder that `train-scorer` wrote, trained on samples of the same network.
        scales: indices of the scales, counted from 0, of which there are several candidates; None for all.
    """

    count: int = 1
    scorer: str | None = None
    scales: tuple[int, ...] | None = None

    @property
    def needed_scorer(self) -> str | None:
        """Returns the scorer that chooses; None if none is named or nothing is chosen."""
        return self.scorer if self.count > 1 else None

    def include(self, scale: int) -> bool:
        """Returns whether a scale has several candidates."""
        return self.count > 1 and (self.scales is None or scale in self.scales)

    def load_scorer(self, quantizer: ResidualQuantizer) -> Scorer | None:
        """Returns the scorer on a quantizer's device, of which the last ones stay in memory; None if nothing is chosen.

        Raises:
            InputError: if there is none in its folder, or it is damaged or of another quantizer.
        """
        if self.needed_scorer is None:
            return None
        config = Path(self.needed_scorer).expanduser() / CONFIG
        written = config.stat().st_mtime_ns if config.exists() else 0
        return cached_scorer(self.needed_scorer, quantizer, quantizer.codebook.weight.device, written)

    def check(self, network: MVARConfig) -> None:
        """Raises InputError unless the scorer and the scales suit a network."""
        if self.needed_scorer is None:
            return
        if network.prediction == "token":
            raise InputError("drafts are of whole scales, but this network predicts single tokens: set drafts to 1")
        scales = network.schedule.num_scales
        if too_fine := [k for k in self.scales or () if k >= scales]:
            raise InputError(
                f"draft_scales has scale {too_fine[0]}, but the network draws {scales}, counted from 0: drop it"
            )
        read_config(self.needed_scorer).check(network, self.needed_scorer)

    def uniforms(self, keys: Tensor, first: Tensor, span: slice) -> Tensor:
        """Returns the random numbers (b, n, m) of all m candidates at the positions `span`.

        Args:
            keys: (b, 2) int64 key of each image.
            first: (b, n) numbers of the first candidate, which alone would be drawn.
            span: positions of the n tokens among all.
        """
        numbers = torch.arange(1, self.count, device=keys.device)[:, None]
        others = uniform(keys, numbers, span.stop, DRAFTS)[..., span]  # (b, m - 1, n)
        return torch.cat([first[:, None], others], dim=1).transpose(1, 2).contiguous()


@lru_cache(maxsize=4)
def cached_scorer(folder: str, quantizer: ResidualQuantizer, device: torch.device, written: int) -> Scorer:
    """Loads a scorer of a quantizer; `written` is the time of its folder, so that a new one is read again."""
    scorer = load_scorer(folder)
    scorer.config.check_quantizer(fingerprint(quantizer), folder)
    return scorer.to(device)


def choose_by_score(scores: Tensor, keys: Tensor, scale: int) -> Tensor:
    """Draws one of the m candidates of each image by the softmax of their scores.

    Args:
        scores: (b, m).
        keys: (b, 2) int64 key of each image.
        scale: number of the scale.

    Returns:
        (b,) int64 index of the candidate.
    """
    cumulative = scores.double().softmax(dim=1).cumsum(dim=1)
    chance = uniform(keys, 0, scale + 1, DRAFTS)[:, -1:].double()  # (b, 1)
    chosen = torch.searchsorted(cumulative, chance * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=scores.shape[1] - 1)
