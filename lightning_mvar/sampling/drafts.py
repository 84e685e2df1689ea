"""Choice among drafts, several candidates for the tokens of a scale, by a scorer (LSRS, arXiv 2512.03796).

The tokens of a scale are drawn independently of each other, so they may not fit together. The score of a candidate
estimates log p_real / p_drawn, up to a constant. A candidate is chosen with a probability proportional to exp(score),
which is sampling importance resampling: with a perfect scorer and many candidates, the choice follows the distribution
of the real images. The paper takes the candidate with the highest score, which overshoots that distribution.
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
    """Number of candidates per scale, and the scorer that chooses among them; `SamplingSettings` checks the values.

    Args:
        count: candidates per scale; 1 for no choice.
        scorer: folder that `train-scorer` wrote, trained on samples of the same network.
        scales: indices of the scales that have several candidates, counted from 0; None for all.
    """

    count: int = 1
    scorer: str | None = None
    scales: tuple[int, ...] | None = None

    @property
    def needed_scorer(self) -> str | None:
        """Folder of the scorer; None if none is given or there is nothing to choose."""
        return self.scorer if self.count > 1 else None

    def include(self, scale: int) -> bool:
        """Returns whether a scale has several candidates."""
        return self.count > 1 and (self.scales is None or scale in self.scales)

    def load_scorer(self, quantizer: ResidualQuantizer) -> Scorer | None:
        """Returns the scorer on the quantizer's device, from a small cache; None if there is nothing to choose.

        Raises:
            InputError: if its folder holds no scorer, or it is damaged or was trained with another quantizer.
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
            raise InputError("drafts are complete scales, but this network predicts single tokens: set drafts to 1")
        scales = network.schedule.num_scales
        if too_fine := [k for k in self.scales or () if k >= scales]:
            raise InputError(
                f"draft_scales has scale {too_fine[0]}, but the network draws {scales}, counted from 0: drop it"
            )
        read_config(self.needed_scorer).check(network, self.needed_scorer)

    def uniforms(self, keys: Tensor, first: Tensor, span: slice) -> Tensor:
        """Returns random numbers (b, n, m) for all m candidates at the positions `span`.

        Args:
            keys: (b, 2) int64 key of each image.
            first: (b, n) numbers of the first candidate, those that drawing without drafts would use.
            span: positions of the n tokens in the packed sequence.
        """
        numbers = torch.arange(1, self.count, device=keys.device)[:, None]
        others = uniform(keys, numbers, span.stop, DRAFTS)[..., span]  # (b, m - 1, n)
        return torch.cat([first[:, None], others], dim=1).transpose(1, 2).contiguous()


@lru_cache(maxsize=4)
def cached_scorer(folder: str, quantizer: ResidualQuantizer, device: torch.device, written: int) -> Scorer:
    """Loads a scorer of a quantizer; `written` is the modification time of its config, so a new scorer is read anew."""
    scorer = load_scorer(folder)
    scorer.config.check_quantizer(fingerprint(quantizer), folder)
    return scorer.to(device)


def choose_by_score(scores: Tensor, keys: Tensor, scale: int) -> Tensor:
    """Draws one of the m candidates of each image from the softmax of their scores.

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
