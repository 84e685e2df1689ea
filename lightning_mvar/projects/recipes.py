"""Sizes and training lengths of tokenizer and network, chosen by the number of pictures and the machine.

Large networks memorize small sets of pictures, so sizes grow with the number of pictures; on a CPU, time is the limit.
The rows for up to 500 and 5,000 pictures on a CPU have been run; those for a GPU follow the published sizes (VAR,
arXiv 2404.02905) and are untested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.costs import count_parameters
from lightning_mvar.projects.pictures import Pictures
from lightning_mvar.scales import PUBLISHED_SIDE_LENGTHS, ScaleSchedule

LEAST_PICTURES = 100
CODE_DIM = 16
# Per image side in pixels: token-map sides and channel multipliers of the tokenizer, whose m levels downsample by
# 2 ** (m - 1).
LAYOUTS: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    32: ((1, 2, 4, 8), (1, 2, 4)),
    64: ((1, 2, 4, 8, 16), (1, 2, 4)),
    128: (PUBLISHED_SIDE_LENGTHS[256], (1, 2, 2, 4)),
    256: (PUBLISHED_SIDE_LENGTHS[256], (1, 1, 2, 2, 4)),
}


@dataclass(frozen=True)
class Machine:
    """Settings that depend only on the machine."""

    accelerator: Literal["cpu", "gpu"]
    precision: Literal["32-true", "bf16-mixed"]
    max_resolution: int
    tokenizer_batch: int  # images per optimizer step of the tokenizer over all devices, fewer for a smaller set
    batch_size: int  # images per optimizer step of the network over all devices, fewer for a smaller set
    state_dim: int  # of Mamba-2
    expand: int  # of Mamba-2
    blocks: int  # residual blocks per level of the tokenizer
    num_workers: int  # image-decoding processes


CPU = Machine("cpu", "32-true", 64, 4, 8, 32, 1, 1, 0)
GPU = Machine("gpu", "bf16-mixed", 256, 64, 128, 64, 2, 2, 8)


@dataclass(frozen=True)
class Recipe:
    """One row of the table of recipes.

    Args:
        machine: kind of machine.
        max_pictures: largest number of pictures that the row is for; infinite in the last row of a machine.
        channels: width of the tokenizer's first level.
        vocab_size: number of codes.
        tokenizer_steps: optimizer steps of the tokenizer.
        depth: number of blocks of the network.
        width: channels per token, 64 per attention head.
        steps: optimizer steps of the network.
    """

    machine: Machine
    max_pictures: float
    channels: int
    vocab_size: int
    tokenizer_steps: int
    depth: int
    width: int
    steps: int

    @property
    def tokenizer_base_lr(self) -> float:
        """Learning rate for a batch of 256: 1.25e-3 at 16 channels, inversely proportional to them."""
        return per_256_images(1.25e-3 * 16 / self.channels, self.machine.tokenizer_batch)

    @property
    def network_base_lr(self) -> float:
        """Learning rate for a batch of 256: 2e-3 at width 128, inversely proportional to it."""
        return per_256_images(2e-3 * 128 / self.width, self.machine.batch_size)

    def network(self, side_lengths: tuple[int, ...], num_classes: int) -> MVARConfig:
        return MVARConfig(
            ScaleSchedule(side_lengths),
            depth=self.depth,
            width=self.width,
            heads=self.width // 64,
            vocab_size=self.vocab_size,
            code_dim=CODE_DIM,
            num_classes=num_classes,
            state_dim=self.machine.state_dim,
            expand=self.machine.expand,
        )


def per_256_images(learning_rate: float, batch_size: int) -> float:
    return float(f"{learning_rate * 256 / batch_size:.2g}")


RECIPES = [
    Recipe(CPU, 500, 16, 256, 2_000, 3, 128, 500),
    Recipe(CPU, 5_000, 16, 512, 3_000, 4, 128, 800),
    Recipe(CPU, math.inf, 24, 1024, 3_000, 6, 192, 3_000),
    Recipe(GPU, 1_000, 32, 256, 3_000, 4, 192, 2_000),
    Recipe(GPU, 10_000, 64, 1024, 20_000, 6, 384, 10_000),
    Recipe(GPU, 100_000, 128, 4096, 50_000, 12, 768, 50_000),
    Recipe(GPU, math.inf, 160, 4096, 200_000, 16, 1024, 200_000),
]


@dataclass(frozen=True)
class Plan:
    """A recipe for given pictures.

    Args:
        pictures: the pictures.
        resolution: side of the images in pixels, one of `LAYOUTS`.
        recipe: the recipe.
    """

    pictures: Pictures
    resolution: int
    recipe: Recipe

    @property
    def side_lengths(self) -> tuple[int, ...]:
        return LAYOUTS[self.resolution][0]

    @property
    def multipliers(self) -> tuple[int, ...]:
        return LAYOUTS[self.resolution][1]

    @property
    def margin(self) -> float:
        """1.0 for square pictures such as icons, which are then shown whole; otherwise 1.125, as in the papers."""
        return 1.0 if self.pictures.are_square else 1.125

    @property
    def views(self) -> int:
        """Number of random crops of each training picture; without a margin, a square picture has only one crop."""
        return 1 if self.margin == 1.0 else max(1, min(8, 20_000 // self.pictures.count))

    @property
    def num_training(self) -> int:
        """Number of pictures to train on, broken ones included."""
        return self.pictures.count - self.pictures.num_held_out

    @property
    def tokenizer_batch(self) -> int:
        return self.batch_of(self.recipe.machine.tokenizer_batch)

    @property
    def batch_size(self) -> int:
        return self.batch_of(self.recipe.machine.batch_size)

    def batch_of(self, size: int) -> int:
        """Returns a batch size, but at most the largest power of two that the training pictures fill."""
        return min(size, 2 ** int(math.log2(self.num_training)))

    @property
    def log_interval(self) -> int:
        """Steps between two log entries, at most an epoch."""
        return min(10, self.num_training // self.batch_size)

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.recipe.network(self.side_lengths, len(self.pictures.class_names)))


def make_plan(pictures: Pictures, resolution: int | None, machine: Machine) -> Plan:
    """Chooses a recipe and, if `resolution` is None, the largest resolution that pictures and machine allow.

    Raises:
        InputError: if there are too few pictures, none to validate on, or a class has none to train on.
    """
    usable = pictures.count - pictures.num_broken
    if usable < LEAST_PICTURES:
        raise InputError(f"{usable} pictures are too few to train on: give at least {LEAST_PICTURES}")
    if not 0 < pictures.num_held_out < pictures.count:
        raise InputError(
            f"{pictures.num_held_out} of {pictures.count} pictures would be held out for validation, which depends on "
            f"their names: add some, or rename one"
        )
    if pictures.untrained:
        raise InputError(
            f"{', '.join(pictures.untrained)}: no picture is left to train on, because a tenth is held out, chosen by "
            f"name: add some, or remove the folder"
        )
    if resolution is None:
        fitting = [side for side in LAYOUTS if side <= min(pictures.side, machine.max_resolution)]
        resolution = max(fitting, default=min(LAYOUTS))
    recipe = next(row for row in RECIPES if row.machine == machine and usable <= row.max_pictures)
    return Plan(pictures, resolution, recipe)


def check_resolution(resolution: int | None) -> None:
    """Raises InputError if there is no layout for a resolution."""
    if resolution is not None and resolution not in LAYOUTS:
        raise InputError(f"--resolution {resolution} has no recipe: choose one of {', '.join(map(str, LAYOUTS))}")


def recipe_table() -> Iterator[str]:
    """Yields the lines of the Markdown table of recipes, with parameters counted for 64 x 64 pixels and 10 classes."""
    yield "| machine | pictures | tokenizer: codes, channels, steps | network: depth x width, parameters, steps |"
    yield "|---|---|---|---|"
    for row in RECIPES:
        pictures = "more" if math.isinf(row.max_pictures) else f"up to {row.max_pictures:,}"
        parameters = count_parameters(row.network(LAYOUTS[64][0], 10)) / 1e6
        tokenizer = f"{row.vocab_size:,}, {row.channels}, {row.tokenizer_steps:,}"
        network = f"{row.depth} x {row.width}, {parameters:.1f}M, {row.steps:,}"
        yield f"| {row.machine.accelerator.upper()} | {pictures} | {tokenizer} | {network} |"
