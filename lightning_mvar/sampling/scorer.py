"""Scorer of drafts: tells real pyramids from drawn ones after any scale (LSRS, arXiv 2512.03796).

| paper / published code        | here          | meaning                                                              |
|-------------------------------|---------------|----------------------------------------------------------------------|
| scoring model, RewardNet      | Scorer        | f_hat after a scale, class, scale -> score                           |
| r_k, idx_Blk                  | drafts        | candidates for the tokens of a scale, drawn from the same logits     |
| M                             | Drafts.count  | number of candidates                                                 |
| ranking loss                  | cross entropy | either way, the score is an estimate of log p_real / p_drawn         |
| the best candidate            | `drafts`      | here it is drawn by the softmax of the scores: `choose_by_score`     |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.json_files import FormatVersion, read_json, write_json
from lightning_mvar.io.tensors import load_strictly, read_weights, save_weights
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.scales import ScaleSchedule, Shape

CONFIG, WEIGHTS, NEW_WEIGHTS = "config.json", "scorer.safetensors", "scorer.new.safetensors"
FILES = {CONFIG, WEIGHTS, NEW_WEIGHTS}  # in a folder; the last one may remain after an interruption
FORMAT = FormatVersion(1, "install the release of lightning_mvar that wrote it, or train it again with this one")
LAST_SIDE = 4  # blocks of stride 2 reduce the map to this side or less
GROUPS = 4  # of GroupNorm
EMBEDDING = 128  # width of the condition
DROPOUT = 0.1


@dataclass(frozen=True)
class ScorerConfig:
    """Architecture of a scorer, and a description of its training data.

    Args:
        format_version: version of the folder's format.
        side_lengths: schedule of the pyramids.
        code_dim: channels of f_hat.
        num_classes: number of classes.
        width: channels of the first convolutions.
        quantizer: fingerprint of the quantizer of the pyramids.
        drawn: network that drew the drawn pyramids, and its settings.
    """

    format_version: int
    side_lengths: list[int | Shape]
    code_dim: int
    num_classes: int
    width: int
    quantizer: str
    drawn: str

    def __post_init__(self) -> None:
        if self.width < GROUPS or self.width % GROUPS:
            raise InputError(f"width {self.width} must be a positive multiple of {GROUPS}")
        require_in("[1, inf)", code_dim=self.code_dim, num_classes=self.num_classes)

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(tuple(self.side_lengths))

    def check(self, network: MVARConfig, folder: str) -> None:
        """Raises InputError unless the scorer in `folder` fits the pyramids that a network draws."""
        for name, ours, theirs in (
            ("side_lengths", self.schedule.side_lengths, network.schedule.side_lengths),
            ("code_dim", self.code_dim, network.code_dim),
            ("num_classes", self.num_classes, network.num_classes),
        ):
            if ours != theirs:
                raise InputError(
                    f"the scorer in {folder} does not fit the network: {name} is {ours} there, {theirs} in the "
                    f"network; train one on its own samples with `lightning-mvar train-scorer`"
                )

    def check_quantizer(self, fingerprint: str, folder: str) -> None:
        """Raises InputError unless the scorer in `folder` was trained with the quantizer with this fingerprint."""
        if self.quantizer != fingerprint:
            raise InputError(
                f"the scorer in {folder} was trained with quantizer {self.quantizer}, but the network uses "
                f"{fingerprint}: train one on its own samples with `lightning-mvar train-scorer`"
            )


class ScorerBlock(nn.Module):
    """Convolution, GroupNorm with gain and shift from the condition, SiLU; residual if the shape is unchanged."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.is_residual = channels == width and stride == 1
        self.conv = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.cond = nn.Linear(EMBEDDING, 2 * width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        gain, shift = self.cond(cond)[..., None, None].chunk(2, dim=1)  # (b, width, 1, 1) each
        h = F.silu(self.norm(self.conv(x)) * (1 + gain) + shift)
        return x + h if self.is_residual else h


class Scorer(nn.Module):
    """Estimates log p_real / p_drawn of f_hat after a scale, given the class, up to a constant per class and scale.

    Args:
        config: architecture.
    """

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.config = config
        schedule, width = config.schedule, config.width
        height, breadth = schedule.shapes[-1]
        self.class_embed = nn.Embedding(config.num_classes, EMBEDDING)
        self.scale_embed = nn.Embedding(schedule.num_scales, EMBEDDING)
        blocks = [ScorerBlock(config.code_dim, width), ScorerBlock(width, width)]
        while max(height, breadth) > LAST_SIDE:
            blocks.append(ScorerBlock(width, width := min(2 * width, 4 * config.width), stride=2))
            height, breadth = -(-height // 2), -(-breadth // 2)
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(DROPOUT)
        self.hidden = nn.Linear(width * height * breadth, EMBEDDING)
        self.out = nn.Linear(EMBEDDING, 1)

    def forward(self, f_hat: Tensor, labels: Tensor, scale: int) -> Tensor:
        """Returns scores (b,) of f_hat (b, c, s, t) after `scale`, given the images' `labels` (b,) int64."""
        cond = F.silu(self.class_embed(labels) + self.scale_embed.weight[scale])  # (b, e)
        x = f_hat
        for block in self.blocks:
            x = block(x, cond)
        x = self.dropout(x.flatten(1))
        x = self.dropout(F.silu(self.hidden(x) + cond))  # (b, e)
        return self.out(x)[:, 0]


def save_scorer(scorer: Scorer, folder: Path) -> None:
    """Writes a scorer to a folder; `config.json` comes last and marks it complete. A full disk keeps an earlier scorer.

    Raises:
        InputError: if a file cannot be written.
    """
    save_weights(scorer, folder / NEW_WEIGHTS)
    (folder / CONFIG).unlink(missing_ok=True)
    (folder / NEW_WEIGHTS).replace(folder / WEIGHTS)
    write_json(folder / CONFIG, asdict(scorer.config))


def read_config(folder: str | Path) -> ScorerConfig:
    """Reads the configuration of the scorer in a folder; raises InputError if it is missing or damaged."""
    path = Path(folder).expanduser() / CONFIG
    if not path.exists():
        raise InputError(f"{path.parent} has no {CONFIG}: not a scorer; train one with `lightning-mvar train-scorer`")
    return read_json(path, ScorerConfig, version=FORMAT)


def load_scorer(folder: str | Path) -> Scorer:
    """Loads a scorer from a folder that `train-scorer` wrote, in eval mode on the CPU.

    Raises:
        InputError: if it is missing or damaged.
    """
    folder, config = Path(folder).expanduser(), read_config(folder)
    with torch.device("meta"):
        scorer = Scorer(config)
    load_strictly(scorer, read_weights(folder / WEIGHTS), folder)
    return scorer.requires_grad_(False)
