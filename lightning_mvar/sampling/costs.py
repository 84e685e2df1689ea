"""Costs of drawing an image with given sampling settings."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.costs import META, count_flops, scale_flops
from lightning_mvar.sampling.drafts import Drafts
from lightning_mvar.sampling.scorer import Scorer, read_config
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.scales import ScaleSchedule


class SamplingCosts(NamedTuple):
    """Costs of drawing an image, without the decoder.

    Args:
        token_steps_per_image: tokens processed by the network and its guide.
        flops_per_sampled_image: FLOPs of both, and of the scorer of drafts; see `models.costs` for what is counted.
    """

    token_steps_per_image: int
    flops_per_sampled_image: int


def sampling_costs(settings: SamplingSettings, network: MVARConfig, guide: MVARConfig | None = None) -> SamplingCosts:
    """Counts the costs of drawing an image.

    Args:
        settings: sampling settings, which must suit the network.
        network: config of the network.
        guide: config of the weaker network that guides, if one does.
    """
    schedule, guided = network.schedule, settings.guide.num_guided_scales(network)
    token_steps = flops = 0
    for k, length in enumerate(schedule.lengths):
        networks = [network, guide or network][: 2 if k < guided else 1]
        token_steps += length * len(networks)
        flops += sum(scale_flops(each)[k] for each in networks)
    return SamplingCosts(token_steps, flops + draft_flops(settings.choice, schedule))


def draft_flops(choice: Drafts, schedule: ScaleSchedule) -> int:
    """Counts FLOPs of scoring all candidates of an image."""
    if choice.needed_scorer is None:
        return 0
    with META:
        scorer = Scorer(config := read_config(choice.needed_scorer))
        f_hat, label = torch.zeros(1, config.code_dim, *schedule.shapes[-1]), torch.zeros(1, dtype=torch.int64)
    candidates = choice.count * sum(map(choice.include, range(schedule.num_scales)))
    return candidates * count_flops(lambda: scorer(f_hat, label, 0))
