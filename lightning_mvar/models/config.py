"""What a network is made of: sizes, and which mixers its blocks have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_mvar.errors import InputError
from lightning_mvar.models.attention import (
    Attention,
    BlockCausalAttention,
    MarkovAttention,
    ScaleAttention,
    WindowAttention,
)
from lightning_mvar.models.base import Mixer
from lightning_mvar.models.recurrences import GatedLinearAttention, LinearAttention, Mamba1, Mamba2, ScaleMamba
from lightning_mvar.scales import ScaleSchedule, Shape, lengths_of

SCAN_ORDERS: dict[str, list[tuple[str, ...]]] = {  # taken in turns by the blocks; see `reading_order`
    "raster": [("raster",)],
    "column": [("column",)],
    "alternating": [("raster",), ("column",)],
    "both": [("raster", "reversed")],
}
SIZES = {"d12": 12, "d16": 16, "d20": 20, "d24": 24, "d30": 30, "d32": 32, "d36": 36}  # name: depth


@dataclass(frozen=True)
class MVARConfig:
    """What a network is made of.

    Args:
        schedule: the scales of an image.
        depth: number of blocks.
        width: d, channels of a token.
        heads: attention heads; must divide `width`.
        vocab_size: v, entries of the tokenizer's codebook.
        code_dim: c, channels of a code.
        num_classes: number of classes; the class `num_classes` means unconditional.
        mixers: token mixers of a block, in the order in which they are applied; see `MIXERS`. A list of such lists is
            taken in turns by the blocks: [[scale_attention, mamba2], [scale_attention]] has Mamba in every second one.
        parallel: mixers of a block all read what enters it, instead of each what the one before has added to.
        prediction: what a step predicts: all tokens of a `scale` at once, or one `token` from all before it. Networks
            that predict single tokens have no scales to look at inside: they mix by attention to what came before
            or by a recurrence.
        qk_norm: L2-normalise queries and keys and learn a temperature per head.
        shared_adaln: one AdaLN projection for all blocks, as in VAR-d36-s.
        drop_path: stochastic-depth rate of the last block, rising linearly from 0 in the first.
        adaln_gate_init: factor on the initial weights of the first two gates.
        window: of `window_attention`: side of the square of tokens that a token sees, odd.
        state_dim: of recurrences: n, numbers that a channel carries.
        conv_width: of Mamba: taps of its convolution.
        expand: of recurrences: inner width over `width`.
        head_dim: of recurrences: p, channels of a head.
        scan_order: in which recurrences read the tokens of a scale: by rows (raster), by columns, by either in every
            second block (alternating), or by rows forwards and backwards at twice the cost (both).
    """

    schedule: ScaleSchedule = field(default_factory=ScaleSchedule)
    depth: int = 16
    width: int = 1024
    heads: int = 16
    vocab_size: int = 4096
    code_dim: int = 32
    num_classes: int = 1000
    mixers: tuple[str, ...] | tuple[tuple[str, ...], ...] = ("scale_attention", "mamba2")
    parallel: bool = False
    prediction: Literal["scale", "token"] = "scale"
    qk_norm: bool = True
    shared_adaln: bool = False
    drop_path: float = 0.0
    adaln_gate_init: float = 1e-3
    state_dim: int = 64
    conv_width: int = 4
    expand: int = 2
    head_dim: int = 64
    window: int = 3
    scan_order: Literal["raster", "column", "alternating", "both"] = "raster"

    def __post_init__(self) -> None:
        if isinstance(self.mixers, str) or len({isinstance(part, str) for part in self.mixers}) > 1:
            raise InputError(f"network.mixers must be a list of names, or of such lists, got {self.mixers!r}")
        mixers = tuple(part if isinstance(part, str) else tuple(part) for part in self.mixers)
        object.__setattr__(self, "mixers", mixers)
        positive = ("depth", "width", "heads", "vocab_size", "code_dim", "num_classes")
        for name in (*positive, "state_dim", "expand", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"network.{name} must be at least 1, got {getattr(self, name)}")
        if self.conv_width < 2:
            raise InputError(f"network.conv_width must be at least 2, got {self.conv_width}")
        if self.width % self.heads:
            raise InputError(f"network.width {self.width} is not a multiple of network.heads {self.heads}")
        if self.window < 1 or self.window % 2 == 0:
            raise InputError(f"network.window must be odd and positive, got {self.window}")
        for name, known in (("scan_order", SCAN_ORDERS), ("prediction", ("scale", "token"))):
            if getattr(self, name) not in known:
                raise InputError(f"network.{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        self.check_mixers()

    def check_mixers(self) -> None:
        names = {name for i in range(self.depth) for name in self.mixers_of(i)}
        if unknown := sorted(names - set(MIXERS)):
            raise InputError(f"network.mixers names {unknown[0]!r}; there are {', '.join(MIXERS)}")
        if names & WITH_HEADS and self.expand * self.width % self.head_dim:
            raise InputError(
                f"network.width {self.width} times expand {self.expand} is not a multiple of head_dim {self.head_dim}"
            )
        if self.scan_order != "raster" and not names & IN_ORDER:
            raise InputError(
                f"network.scan_order {self.scan_order} is for {', '.join(sorted(IN_ORDER))}: there is none"
            )
        if self.shared_adaln and len({len(self.mixers_of(i)) for i in range(self.depth)}) > 1:
            raise InputError("network.shared_adaln is one table for all blocks: network.mixers must give all as many")
        if self.prediction == "token" and (whole := sorted(names & INSIDE_SCALES) or self.scan_order != "raster"):
            what = f"network.mixers {', '.join(whole)}" if isinstance(whole, list) else f"scan_order {self.scan_order}"
            raise InputError(f"{what} sees whole scales, which network.prediction token does not have")

    def mixers_of(self, block: int) -> tuple[str, ...]:
        """Names of the mixers of a block, by its number."""
        if any(isinstance(part, str) for part in self.mixers) or not self.mixers:
            return self.mixers  # type: ignore[return-value]
        return self.mixers[block % len(self.mixers)]  # type: ignore[return-value]

    def orders_of(self, block: int) -> tuple[str, ...]:
        """The orders in which the recurrence of a block reads, by its number: they take turns where there is one."""
        orders = SCAN_ORDERS[self.scan_order]
        before = sum(not IN_ORDER.isdisjoint(self.mixers_of(i)) for i in range(block))
        return orders[before % len(orders)]

    @property
    def turn(self) -> int:
        """After how many blocks their kinds come again."""
        kinds = 1 if self.mixers_of(0) == self.mixers else len(self.mixers)
        reading = sum(not IN_ORDER.isdisjoint(self.mixers_of(i)) for i in range(kinds))
        orders = len(SCAN_ORDERS[self.scan_order])
        return kinds * (orders // math.gcd(orders, reading))

    @property
    def mixing(self) -> str:
        """The mixers in words."""
        different = dict.fromkeys(self.mixers_of(i) for i in range(self.depth))
        return " / ".join(", ".join(names) or "none" for names in different)

    @property
    def step_shapes(self) -> tuple[Shape, ...]:
        """Height and width of each step's tokens: those of a scale, or one."""
        return self.schedule.shapes if self.prediction == "scale" else ((1, 1),) * self.schedule.num_tokens

    @property
    def step_lengths(self) -> tuple[int, ...]:
        """Tokens of each step."""
        return lengths_of(self.step_shapes)

    @property
    def num_inputs(self) -> int:
        """Tokens that have an input: all but those of the first step, which start from the class."""
        return self.schedule.num_tokens - self.step_lengths[0]

    @classmethod
    def for_size(cls, name: str, **overrides: object) -> MVARConfig:
        """A published size, d12 to d36: depth D, width 64 D, D heads, drop path 0.1 D / 24."""
        depth = SIZES[name]
        published = {"depth": depth, "width": 64 * depth, "heads": depth, "drop_path": 0.1 * depth / 24}
        return cls(**(published | overrides))  # type: ignore[arg-type]


def attention(kind: type[Attention]) -> Callable[[MVARConfig, int], Mixer]:
    return lambda c, block: kind(c.width, c.heads, c.qk_norm)


def linear(kind: type[LinearAttention]) -> Callable[[MVARConfig, int], Mixer]:
    return lambda c, block: kind(c.width, c.state_dim, c.expand, c.head_dim, c.orders_of(block))


# By name, what makes one for a block, by its number.
MIXERS: dict[str, Callable[[MVARConfig, int], Mixer]] = {
    "scale_attention": attention(ScaleAttention),
    "window_attention": lambda c, block: WindowAttention(c.width, c.heads, c.qk_norm, c.window),
    "scale_mamba": lambda c, block: ScaleMamba(c.width, c.state_dim, c.conv_width, c.expand, c.head_dim),
    "block_causal_attention": attention(BlockCausalAttention),
    "markov_attention": attention(MarkovAttention),
    "mamba2": lambda c, block: Mamba2(c.width, c.state_dim, c.conv_width, c.expand, c.head_dim, c.orders_of(block)),
    "mamba1": lambda c, block: Mamba1(c.width, c.state_dim, c.conv_width, c.expand, c.orders_of(block)),
    "gated_linear_attention": linear(GatedLinearAttention),
    "linear_attention": linear(LinearAttention),
}
BASELINES: dict[str, dict[str, Any]] = {  # published divisions of labour; configs/mixer has each, and others
    "mvar": {"mixers": ("scale_attention", "mamba2")},
    "var": {"mixers": ("block_causal_attention",)},
    "markov": {"mixers": ("markov_attention",)},
    "mamba_only": {"mixers": ("mamba2",)},
    "attention_only": {"mixers": ("scale_attention",)},
    "ar_raster": {"mixers": ("block_causal_attention",), "prediction": "token"},
}
WITH_HEADS = {"scale_mamba", "mamba2", "gated_linear_attention", "linear_attention"}  # of `head_dim` channels
IN_ORDER = {"mamba2", "mamba1", "gated_linear_attention", "linear_attention"}  # what `scan_order` is for
INSIDE_SCALES = {"scale_attention", "window_attention", "scale_mamba"}  # what carries nothing from scale to scale
