"""The scale-by-scale network: M-VAR, VAR, and whatever other mixers a block is given.

Papers: M-VAR (arXiv 2411.10433), VAR (arXiv 2404.02905).

| paper / published code         | here           | meaning                                                    |
|--------------------------------|----------------|------------------------------------------------------------|
| patch_nums                     | side_lengths   | side of each token map, coarse to fine                     |
| x_BLCv_wo_first_l              | scale_inputs   | teacher-forcing input of every scale but the first         |
| pos_start, pos_1LC, lvl_embed  | start_embed, pos_embed, scale_embed | added to the input tokens             |
| gamma, scale, shift (AdaLN)    | gate, gain, shift | per-channel modulation of each branch by the class      |
| sos / cond_BD                  | cond           | class embedding: the first token, and the AdaLN's input    |

Shapes: b batch, l tokens, d width, k scale, v vocabulary, c code dim, m branches of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mvar.errors import InputError
from lightning_mvar.models.mixers import Attention, BlockCausalAttention, Mamba2, ScaleAttention, State
from lightning_mvar.ops.kernels import look_for_kernels
from lightning_mvar.scales import ScaleSchedule

EXACT = ("A_log", "dt_bias", "qk_scale_log")  # what is exponentiated: decays over all tokens, temperatures
LOGITS_AT_ONCE = 2**24  # while scoring: 64 MiB
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
        mixers: token mixers of a block, in the order in which they are applied; see `MIXERS`.
        qk_norm: L2-normalise queries and keys and learn a temperature per head.
        shared_adaln: one AdaLN projection for all blocks, as in VAR-d36-s.
        drop_path: stochastic-depth rate of the last block, rising linearly from 0 in the first.
        adaln_gate_init: factor on the initial weights of the first two gates.
        mamba_state_dim: n, SSM state of a Mamba channel.
        mamba_conv_width: taps of Mamba's convolution.
        mamba_expand: inner width of Mamba over `width`.
        mamba_head_dim: p, channels of a Mamba head.
    """

    schedule: ScaleSchedule = field(default_factory=ScaleSchedule)
    depth: int = 16
    width: int = 1024
    heads: int = 16
    vocab_size: int = 4096
    code_dim: int = 32
    num_classes: int = 1000
    mixers: tuple[str, ...] = ("scale_attention", "mamba2")
    qk_norm: bool = True
    shared_adaln: bool = False
    drop_path: float = 0.0
    adaln_gate_init: float = 1e-3
    mamba_state_dim: int = 64
    mamba_conv_width: int = 4
    mamba_expand: int = 2
    mamba_head_dim: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixers", tuple(self.mixers))
        positive = ("depth", "width", "heads", "vocab_size", "code_dim", "num_classes")
        for name in (*positive, "mamba_state_dim", "mamba_expand", "mamba_head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"network.{name} must be at least 1, got {getattr(self, name)}")
        if self.mamba_conv_width < 2:
            raise InputError(f"network.mamba_conv_width must be at least 2, got {self.mamba_conv_width}")
        if self.width % self.heads:
            raise InputError(f"network.width {self.width} is not a multiple of network.heads {self.heads}")
        if unknown := [name for name in self.mixers if name not in MIXERS]:
            raise InputError(f"network.mixers names {unknown[0]!r}; there are {', '.join(MIXERS)}")
        if self.mamba_expand * self.width % self.mamba_head_dim:
            raise InputError(
                f"network.width {self.width} times mamba_expand {self.mamba_expand} is not a multiple of "
                f"mamba_head_dim {self.mamba_head_dim}"
            )

    @classmethod
    def for_size(cls, name: str, **overrides: object) -> MVARConfig:
        """A published size, d12 to d36: depth D, width 64 D, D heads, drop path 0.1 D / 24."""
        depth = SIZES[name]
        published = {"depth": depth, "width": 64 * depth, "heads": depth, "drop_path": 0.1 * depth / 24}
        return cls(**(published | overrides))  # type: ignore[arg-type]


MIXERS: dict[str, Callable[[MVARConfig], nn.Module]] = {
    "scale_attention": lambda c: ScaleAttention(c.width, c.heads, c.qk_norm),
    "block_causal_attention": lambda c: BlockCausalAttention(c.width, c.heads, c.qk_norm),
    "mamba2": lambda c: Mamba2(c.width, c.mamba_state_dim, c.mamba_conv_width, c.mamba_expand, c.mamba_head_dim),
}


@dataclass
class BlockState:
    """What a block keeps while an image is sampled: its AdaLN table (b, 1, 3, m, d) and the states of its mixers."""

    modulation: Tensor
    mixers: tuple[State, ...]


@dataclass
class MVARState:
    """What the network keeps while an image is sampled: the scale that comes next, cond (b, d), and every block's.

    Blocks have none before the first scale: their AdaLN tables are made with it, and kept.
    """

    scale: int
    cond: Tensor
    blocks: list[BlockState | None]


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch of a whole sample with probability `rate`, rescale the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """Mixers, then an MLP, each a residual branch modulated by the class: x + drop_path(gate * branch(AdaLN(x)))."""

    def __init__(self, config: MVARConfig, drop_path: float) -> None:
        super().__init__()
        self.config = config
        d, branches = config.width, len(config.mixers) + 1
        self.mixers = nn.ModuleList(MIXERS[name](config) for name in config.mixers)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU("tanh"), nn.Linear(4 * d, d))
        if config.shared_adaln:
            self.adaln_table = nn.Parameter(torch.empty(1, 1, 3 * branches, d))
        else:
            self.adaln = nn.Linear(d, 3 * branches * d)
        self.drop_path = DropPath(drop_path)

    def modulation(self, cond: Tensor) -> Tensor:
        """(b, 1, 3, m, d): gate, gain and shift of each branch, from cond (b, d) or the shared table (b, 1, 3 m, d)."""
        if hasattr(self, "adaln"):
            table = self.adaln(F.silu(cond))[:, None].unflatten(-1, (-1, cond.shape[-1]))
        else:
            table = self.adaln_table + cond
        return table.unflatten(2, (3, -1))

    def forward(
        self, x: Tensor, cond: Tensor | None, lengths: tuple[int, ...], state: BlockState | None = None
    ) -> tuple[Tensor, BlockState]:
        """Tokens x (b, l, d) of the scales in `lengths`; `cond` to begin an image, `state` to continue one."""
        if state is None:
            assert cond is not None
            state = BlockState(self.modulation(cond), (None,) * len(self.mixers))
        branches = zip(*(table.unbind(2) for table in state.modulation.unbind(2)), strict=True)
        carried = []
        for mixer, before in zip(self.mixers, state.mixers, strict=True):
            gate, gain, shift = next(branches)  # each (b, 1, d)
            y, after = mixer(modulated(x, gain, shift), lengths, before)
            x = torch.addcmul(x, self.drop_path(gate), y)
            carried.append(after)
        gate, gain, shift = next(branches)
        x = torch.addcmul(x, self.drop_path(gate), self.mlp(modulated(x, gain, shift)))
        return x, BlockState(state.modulation, tuple(carried))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place: small writes to the residual stream, the first two gates nearly closed."""
        d, output_scale = self.config.width, 1 / math.sqrt(2 * self.config.depth)
        draw_weights(self, weight_std(d))
        self.mlp[2].weight.mul_(output_scale)  # type: ignore[operator]
        for mixer in self.mixers:
            if isinstance(mixer, Attention):
                mixer.proj.weight.mul_(output_scale)
        if self.config.shared_adaln:
            nn.init.normal_(self.adaln_table, std=1 / math.sqrt(d))
            self.adaln_table[:, :, :2].mul_(self.config.adaln_gate_init)
            self.adaln_table[:, :, 2:].mul_(0.5)
        else:
            self.adaln.weight[: 2 * d].mul_(self.config.adaln_gate_init)
            self.adaln.weight[2 * d :].mul_(0.5)


class MVAR(nn.Module):
    """Next-scale prediction: logits of every token of scale k from the scales before it and the class."""

    def __init__(self, config: MVARConfig) -> None:
        super().__init__()
        look_for_kernels()
        self.config = config
        schedule, d = config.schedule, config.width
        self.class_embed = nn.Embedding(config.num_classes + 1, d)
        self.start_embed = nn.Parameter(torch.empty(1, schedule.first, d))
        self.scale_embed = nn.Embedding(schedule.num_scales, d)
        self.pos_embed = nn.Parameter(torch.empty(1, schedule.num_tokens, d))
        self.input_proj = nn.Linear(config.code_dim, d)
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(d, 3 * (len(config.mixers) + 1) * d)
        last = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.depth))
        self.head_adaln = nn.Linear(d, 2 * d)
        self.head = nn.Linear(d, config.vocab_size)
        self.init_weights()

    @overload
    def forward(self, labels: Tensor, scale_inputs: Tensor) -> Tensor: ...

    @overload
    def forward(self, labels: Tensor, scale_inputs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, labels: Tensor, scale_inputs: Tensor, tokens: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced logits of all scales at once, or how well they tell the tokens.

        Args:
            labels: (b,) int64 in [0, num_classes]; `num_classes` is unconditional.
            scale_inputs: (b, l - first, c) what `Tokenizer.scale_inputs` gives for the image's tokens.
            tokens: (b, l) int64, the image's own.

        Returns:
            (b, l, v) float32 logits; those of scale k depend on tokens of scales before k only. With `tokens`, what
            `score` gives: all logits are then never in memory at once.
        """
        cond = self.class_embed(labels)  # (b, d)
        x = torch.cat([self.start(cond), self.project(scale_inputs)], dim=1)  # (b, l, d)
        x = x + self.positions(range(self.config.schedule.num_scales))
        block_cond = self.block_cond(cond)
        for block in self.blocks:
            x, _ = block(x, block_cond, self.config.schedule.lengths)
        if tokens is None:
            return self.logits(x, cond)
        at_once = max(1, LOGITS_AT_ONCE // (x.shape[1] * self.config.vocab_size))
        parts = zip(*(t.split(at_once) for t in (x, cond, tokens)), strict=True)
        # Logits are made again in the backward pass: kept, they would take more memory than a block.
        scores = [checkpoint(self.score, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        losses, correct = zip(*scores, strict=True)
        return torch.cat(losses), torch.cat(correct)

    def score(self, x: Tensor, cond: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of the last block's x (b, l, d): cross entropy (b, l) in nats, and whether the likeliest token is right."""
        logits = self.logits(x, cond)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return losses.view_as(tokens), (logits.detach().argmax(dim=-1) == tokens).float()

    def init_state(self, labels: Tensor) -> MVARState:
        """State before the first scale, for images of `labels` (b,) int64 in [0, num_classes]."""
        return MVARState(0, self.class_embed(labels), [None] * self.config.depth)

    def step(self, scale_inputs: Tensor | None, state: MVARState) -> tuple[Tensor, MVARState]:
        """One scale, continuing where `state` ends; the steps together equal `forward`.

        Args:
            scale_inputs: (b, side_k ** 2, c) input of scale k; None for the first.
            state: as returned by `init_state` or the step before.

        Returns:
            (b, side_k ** 2, v) float32 logits of scale k, and the state for the next.
        """
        k = state.scale
        x = self.start(state.cond) if scale_inputs is None else self.project(scale_inputs)
        x = x + self.positions(range(k, k + 1))
        block_cond = self.block_cond(state.cond) if k == 0 else None
        blocks: list[BlockState | None] = []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x, after = block(x, block_cond, self.config.schedule.lengths[k : k + 1], before)
            blocks.append(after)
        return self.logits(x, state.cond), MVARState(k + 1, state.cond, blocks)

    def start(self, cond: Tensor) -> Tensor:
        """(b, first, d): the class embedding stands where no scale precedes."""
        return cond[:, None] + self.start_embed

    def project(self, scale_inputs: Tensor) -> Tensor:
        """(b, l, c) -> (b, l, d); a frozen tokenizer may be in another dtype than the network."""
        return self.input_proj(scale_inputs.to(self.input_proj.weight.dtype))

    def positions(self, scales: range) -> Tensor:
        """(1, l, d): scale and position embeddings of the tokens of consecutive `scales`."""
        lengths = self.config.schedule.lengths
        begin = self.config.schedule.offsets[scales[0]]
        end = begin + sum(lengths[k] for k in scales)
        scale_embed = torch.cat([self.scale_embed.weight[k].expand(lengths[k], -1) for k in scales])
        return self.pos_embed[:, begin:end] + scale_embed

    def block_cond(self, cond: Tensor) -> Tensor:
        """What the blocks' AdaLN takes: cond (b, d) itself, or the shared projection of it (b, 1, 3 m, d)."""
        if not self.config.shared_adaln:
            return cond
        return self.shared_adaln(F.silu(cond))[:, None].unflatten(-1, (-1, cond.shape[-1]))

    def logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, v), in float32 even under autocast: small logit differences decide the sampling."""
        device = "cpu" if x.is_meta else x.device.type  # the meta device, where operations are counted, has no autocast
        with torch.autocast(device, enabled=False):
            gain, shift = F.linear(F.silu(cond.float()), *float_parameters(self.head_adaln))[:, None].chunk(2, dim=-1)
            x = modulated(x.float(), gain, shift)
            return F.linear(x, *float_parameters(self.head))

    def lower(self, dtype: torch.dtype) -> MVAR:
        """Cast the weights in place, to sample in less memory and time; but for `EXACT`."""
        exact = {name: p.data for name, p in self.named_parameters() if name.endswith(EXACT)}
        self.to(dtype)
        for name, value in exact.items():
            self.get_parameter(name).data = value
        return self

    def init_weights(self) -> None:
        """Initialise every parameter in place (VAR, appendix; M-VAR keeps it)."""
        for block in self.blocks:
            block.init_weights()  # type: ignore[operator]
        self.init_outer_weights()

    @torch.no_grad()
    def init_outer_weights(self) -> None:
        """Initialise what is not of a block, in place: embeddings, the projections in and out."""
        std = weight_std(self.config.width)
        for name, module in self.named_children():
            if name != "blocks":
                draw_weights(module, std)
        nn.init.trunc_normal_(self.start_embed, std=std)
        nn.init.trunc_normal_(self.pos_embed, std=std)
        self.head.weight.mul_(0.02)
        self.head_adaln.weight.mul_(0.5)


def weight_std(width: int) -> float:
    return math.sqrt(1 / width / 3)


def draw_weights(part: nn.Module, std: float) -> None:
    """Normal weights truncated at +-2, biases 0, and what mixers start from."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, nn.Conv1d):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, Attention):
            module.reset_bias_and_scale()
        elif isinstance(module, Mamba2):
            module.reset_scan_parameters()
            nn.init.ones_(module.norm.weight)
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            nn.init.zeros_(module.bias)


def modulated(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """AdaLN of x (b, l, d): LayerNorm without learned affine, then gain and shift, each (b, 1, d)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + gain)


def float_parameters(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.float(), linear.bias.float()
