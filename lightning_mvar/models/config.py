"""Network configuration: sizes, and the token mixers of each block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_mvar.errors import InputError, require_in
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

SCAN_ORDERS: dict[str, list[tuple[str, ...]]] = {  # blocks cycle through the list; see `reading_order`
    "raster": [("raster",)],
    "column": [("column",)],
    "alternating": [("raster",), ("column",)],
    "both": [("raster", "reversed")],
}
# Smallest and largest value per field; the largest keep a forged config from allocating or looping without limit.
RANGES = {
    "depth": (1, 2**10),
    "width": (1, 2**16),
    "heads": (1, 2**16),
    "vocab_size": (1, 2**20),
    "code_dim": (1, 2**14),
    "num_classes": (1, 2**24),
    "state_dim": (1, 2**12),
    "conv_width": (2, 2**10),
    "expand": (1, 2**6),
    "head_dim": (1, 2**16),
    "window": (1, 2**12),
}
TOKEN_FIELDS = ("schedule", "vocab_size", "code_dim", "num_classes")  # determined by tokenizer and token shards
MAX_MIXERS = 16  # per block
SIZES = {"d12": 12, "d16": 16, "d20": 20, "d24": 24, "d30": 30, "d32": 32, "d36": 36}  # name: depth


@dataclass(frozen=True)
class MVARConfig:
    """Architecture of a network.

    Args:
        schedule: the scales of an image.
        depth: number of blocks.
        width: d, channels per token.
        heads: number of attention heads; must divide `width`.
        vocab_size: v, size of the tokenizer's codebook.
        code_dim: c, channels per code.
        num_classes: number of classes; the label `num_classes` means unconditional.
        mixers: token mixers of each block, in order of application; the error for an unknown name lists all. Given a
            list of lists, blocks cycle through it: [[scale_attention, mamba2], [scale_attention]] has Mamba in every
            second block.
        parallel: all mixers of a block read the block's input, instead of each reading the output of the previous one.
        prediction: `scale` predicts all tokens of a scale per step, `token` a single token from all earlier ones.
            Single tokens have no scale to attend inside, so `token` needs mixers that attend to earlier tokens or
            are recurrent.
        qk_norm: L2-normalize queries and keys, and learn a softmax scale per head.
        shared_adaln: share one AdaLN projection among all blocks, as in VAR-d36-s.
        drop_path: drop path rate of the last block, rising linearly from 0 in the first.
        adaln_gate_init: factor on the initial weights of the first two gates.
        window: side of the square that each token attends to in `window_attention`; odd.
        state_dim: n, state size per channel in recurrences.
        conv_width: number of taps of Mamba's convolution.
        expand: inner width of recurrences as a multiple of `width`.
        head_dim: p, channels per head in recurrences.
        scan_order: order in which recurrences read the tokens of a scale: by rows (raster), by columns (column), by
            rows and columns in alternating blocks (alternating), or by rows forwards and backwards at twice the cost
            (both).
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
            raise InputError(f"network.mixers must be a list of names or a list of such lists, got {self.mixers!r}")
        mixers = tuple(part if isinstance(part, str) else tuple(part) for part in self.mixers)
        object.__setattr__(self, "mixers", mixers)
        for name, (minimum, maximum) in RANGES.items():
            require_in(f"[{minimum}, {maximum}]", "network.", **{name: getattr(self, name)})
        require_in("[0, 1)", "network.", drop_path=self.drop_path)
        if not math.isfinite(self.adaln_gate_init):
            raise InputError(f"network.adaln_gate_init must be finite, got {self.adaln_gate_init}")
        if self.width % self.heads:
            raise InputError(f"network.width {self.width} is not a multiple of network.heads {self.heads}")
        if self.window % 2 == 0:
            raise InputError(f"network.window must be odd and positive, got {self.window}")
        for name, known in (("scan_order", SCAN_ORDERS), ("prediction", ("scale", "token"))):
            if getattr(self, name) not in known:
                raise InputError(f"network.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self.check_mixers()

    def check_mixers(self) -> None:
        if (count := max(len(self.mixers_of(i)) for i in range(self.depth))) > MAX_MIXERS:
            raise InputError(f"network.mixers has {count} mixers in a block; at most {MAX_MIXERS}")
        given = {name for part in self.mixers for name in ((part,) if isinstance(part, str) else part)}
        if unknown := sorted(given - set(MIXERS)):  # even in blocks beyond the depth
            raise InputError(f"network.mixers has an unknown mixer {unknown[0]!r}; choose from {', '.join(MIXERS)}")
        names = {name for i in range(self.depth) for name in self.mixers_of(i)}
        if names & MULTI_HEAD_RECURRENCES and self.expand * self.width % self.head_dim:
            raise InputError(
                f"network.width {self.width} times expand {self.expand} is not a multiple of head_dim {self.head_dim}"
            )
        if self.scan_order != "raster" and not names & ORDERED_RECURRENCES:
            recurrences = ", ".join(sorted(ORDERED_RECURRENCES))
            raise InputError(f"network.scan_order {self.scan_order} needs one of {recurrences} in network.mixers")
        if self.shared_adaln and len({len(self.mixers_of(i)) for i in range(self.depth)}) > 1:
            raise InputError(
                "network.shared_adaln needs the same number of mixers in each block; change network.mixers"
            )
        if self.prediction == "token" and (intra := sorted(names & INTRA_SCALE_MIXERS) or self.scan_order != "raster"):
            what = f"network.mixers {', '.join(intra)}" if isinstance(intra, list) else f"scan_order {self.scan_order}"
            raise InputError(f"{what} needs complete scales; set network.prediction to scale")

    def mixers_of(self, block: int) -> tuple[str, ...]:
        """Returns the mixer names of block number `block`."""
        if any(isinstance(part, str) for part in self.mixers) or not self.mixers:
            return self.mixers  # type: ignore[return-value]
        return self.mixers[block % len(self.mixers)]  # type: ignore[return-value]

    def drop_path_of(self, block: int) -> float:
        """Returns the drop path rate of block number `block`."""
        return self.drop_path * block / max(self.depth - 1, 1)

    def orders_of(self, block: int) -> tuple[str, ...]:
        """Returns the scan orders of block number `block`; blocks with a recurrence cycle through them."""
        orders = SCAN_ORDERS[self.scan_order]
        earlier = sum(not ORDERED_RECURRENCES.isdisjoint(self.mixers_of(i)) for i in range(block))
        return orders[earlier % len(orders)]

    @property
    def mixer_period(self) -> int:
        """Number of blocks after which the mixer pattern repeats."""
        period = 1 if self.mixers_of(0) == self.mixers else len(self.mixers)
        recurrent_blocks = sum(not ORDERED_RECURRENCES.isdisjoint(self.mixers_of(i)) for i in range(period))
        orders = len(SCAN_ORDERS[self.scan_order])
        return period * (orders // math.gcd(orders, recurrent_blocks))

    @property
    def mixer_summary(self) -> str:
        """Mixer names of each distinct block, for messages."""
        distinct = dict.fromkeys(self.mixers_of(i) for i in range(self.depth))
        return " / ".join(", ".join(names) or "none" for names in distinct)

    @property
    def step_shapes(self) -> tuple[Shape, ...]:
        """Height and width of each step's token map; (1, 1) if steps predict single tokens."""
        return self.schedule.shapes if self.prediction == "scale" else ((1, 1),) * self.schedule.num_tokens

    @property
    def step_lengths(self) -> tuple[int, ...]:
        """Number of tokens per step."""
        return lengths_of(self.step_shapes)

    @property
    def num_inputs(self) -> int:
        """Number of teacher-forcing inputs: all tokens except those of the first step, which start from the class."""
        return self.schedule.num_tokens - self.step_lengths[0]

    @classmethod
    def for_size(cls, name: str, **overrides: object) -> MVARConfig:
        """Returns a published size, d12 to d36: depth D, width 64 D, D heads, drop path 0.1 D / 24."""
        if name not in SIZES:
            raise InputError(f"there is no size {name}; choose from {', '.join(SIZES)}")
        depth = SIZES[name]
        published = {"depth": depth, "width": 64 * depth, "heads": depth, "drop_path": 0.1 * depth / 24}
        return cls(**(published | overrides))  # type: ignore[arg-type]


@dataclass(frozen=True)
class NetworkOptions(MVARConfig):
    """Options of the network to train. Those that tokenizer, token shards or initial weights determine may be left out.

    Any other option that is not given has the value of the initial weights or, without any, the default of MVARConfig.

    Args:
        schedule: scales of an image; the tokenizer's if not given.
        vocab_size: v; the tokenizer's if not given.
        code_dim: c; the tokenizer's if not given.
        num_classes: number of classes; the token shards' if not given.
    """

    schedule: ScaleSchedule | None = None  # type: ignore[assignment]
    depth: int | None = None  # type: ignore[assignment]
    width: int | None = None  # type: ignore[assignment]
    heads: int | None = None  # type: ignore[assignment]
    vocab_size: int | None = None  # type: ignore[assignment]
    code_dim: int | None = None  # type: ignore[assignment]
    num_classes: int | None = None  # type: ignore[assignment]
    mixers: tuple[str, ...] | tuple[tuple[str, ...], ...] | None = None  # type: ignore[assignment]
    parallel: bool | None = None  # type: ignore[assignment]
    prediction: Literal["scale", "token"] | None = None  # type: ignore[assignment]
    qk_norm: bool | None = None  # type: ignore[assignment]
    shared_adaln: bool | None = None  # type: ignore[assignment]
    drop_path: float | None = None  # type: ignore[assignment]
    adaln_gate_init: float | None = None  # type: ignore[assignment]
    state_dim: int | None = None  # type: ignore[assignment]
    conv_width: int | None = None  # type: ignore[assignment]
    expand: int | None = None  # type: ignore[assignment]
    head_dim: int | None = None  # type: ignore[assignment]
    window: int | None = None  # type: ignore[assignment]
    scan_order: Literal["raster", "column", "alternating", "both"] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Rejects invalid options before weights, tokenizer and shards are read."""
        self.complete()

    def complete(self, base: MVARConfig | None = None, **known: Any) -> MVARConfig:
        """Returns the complete configuration.

        Args:
            base: supplies the options that are neither given nor known; the default configuration if None.
            known: values determined by tokenizer and shards; options that were given take precedence.

        Raises:
            InputError: if the result is not a valid configuration.
        """
        return MVARConfig(**((vars(base) if base else {}) | known | self.given()))

    def given(self) -> dict[str, Any]:
        """Returns the options that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


def attention_factory(kind: type[Attention]) -> Callable[[MVARConfig, int], Mixer]:
    return lambda c, block: kind(c.width, c.heads, c.qk_norm)


def linear_attention_factory(kind: type[LinearAttention]) -> Callable[[MVARConfig, int], Mixer]:
    return lambda c, block: kind(c.width, c.state_dim, c.expand, c.head_dim, c.orders_of(block))


# Mixer factories by name: factory(config, block_index).
MIXERS: dict[str, Callable[[MVARConfig, int], Mixer]] = {
    "scale_attention": attention_factory(ScaleAttention),
    "window_attention": lambda c, block: WindowAttention(c.width, c.heads, c.qk_norm, c.window),
    "scale_mamba": lambda c, block: ScaleMamba(c.width, c.state_dim, c.conv_width, c.expand, c.head_dim),
    "block_causal_attention": attention_factory(BlockCausalAttention),
    "markov_attention": attention_factory(MarkovAttention),
    "mamba2": lambda c, block: Mamba2(c.width, c.state_dim, c.conv_width, c.expand, c.head_dim, c.orders_of(block)),
    "mamba1": lambda c, block: Mamba1(c.width, c.state_dim, c.conv_width, c.expand, c.orders_of(block)),
    "gated_linear_attention": linear_attention_factory(GatedLinearAttention),
    "linear_attention": linear_attention_factory(LinearAttention),
}
BASELINES: dict[str, dict[str, Any]] = {  # published architectures; configs/mixer has these and more
    "mvar": {"mixers": ("scale_attention", "mamba2")},
    "var": {"mixers": ("block_causal_attention",)},
    "markov": {"mixers": ("markov_attention",)},
    "mamba_only": {"mixers": ("mamba2",)},
    "attention_only": {"mixers": ("scale_attention",)},
    "ar_raster": {"mixers": ("block_causal_attention",), "prediction": "token"},
}
MULTI_HEAD_RECURRENCES = {"scale_mamba", "mamba2", "gated_linear_attention", "linear_attention"}  # use `head_dim`
ORDERED_RECURRENCES = {"mamba2", "mamba1", "gated_linear_attention", "linear_attention"}  # use `scan_order`
INTRA_SCALE_MIXERS = {"scale_attention", "window_attention", "scale_mamba"}  # keep no state between scales
