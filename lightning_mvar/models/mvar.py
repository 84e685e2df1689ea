"""The scale-by-scale network: M-VAR, VAR, and whatever other mixers a block is given.

Papers: M-VAR (arXiv 2411.10433), VAR (arXiv 2404.02905).

| paper / published code         | here           | meaning                                                    |
|--------------------------------|----------------|------------------------------------------------------------|
| patch_nums                     | side_lengths   | side of each token map, coarse to fine                     |
| x_BLCv_wo_first_l              | scale_inputs   | teacher-forcing input of every scale but the first         |
| pos_start, pos_1LC, lvl_embed  | start_embed, pos_embed, scale_embed | added to the input tokens             |
| gamma, 1 + scale, shift (AdaLN) | gate, gain, shift | per-channel modulation of each branch by the class     |
| sos / cond_BD                  | cond           | class embedding: the first token, and the AdaLN's input    |

Shapes: b batch, l tokens, d width, k scale, v vocabulary, c code dim, m branches of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mvar.models.attention import Attention
from lightning_mvar.models.base import Mixer, State
from lightning_mvar.models.config import MIXERS, MVARConfig
from lightning_mvar.ops.kernels import look_for_kernels
from lightning_mvar.scales import Shape

# Parameters that get exponentiated (decays over all tokens, temperatures): kept in float32 and without weight decay.
KEEP_FLOAT32 = ("A_log", "dt_bias", "decay_log", "qk_scale_log")
UNDECAYED = ("start_embed", "pos_embed", "scale_embed.weight", "adaln_table", *KEEP_FLOAT32)
LOGITS_AT_ONCE = 2**24  # while scoring: 64 MiB


class Modulation(NamedTuple):
    """What the class makes of a branch, each (b, 1, d): factors of its output and of its normalised input, a shift."""

    gate: Tensor
    gain: Tensor
    shift: Tensor


@dataclass
class BlockState:
    """What a block keeps while an image is sampled."""

    modulation: list[Modulation]  # of its mixers, then of its MLP
    mixers: tuple[State, ...]


@dataclass
class MVARState:
    """What the network keeps while an image is sampled: the step that comes next, cond (b, d), and every block's.

    Blocks have none before the first step: their AdaLN tables are made with it, and kept.
    """

    step: int
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

    def __init__(self, config: MVARConfig, number: int, drop_path: float) -> None:
        super().__init__()
        self.config = config
        names = config.mixers_of(number)
        d, branches = config.width, len(names) + 1
        self.mixers = nn.ModuleList(MIXERS[name](config, number) for name in names)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU("tanh"), nn.Linear(4 * d, d))
        if config.shared_adaln:
            self.adaln_table = nn.Parameter(torch.empty(1, 1, 3 * branches, d))
        else:
            self.adaln = nn.Linear(d, 3 * branches * d)
        self.drop_path = DropPath(drop_path)

    def modulation(self, cond: Tensor) -> list[Modulation]:
        """Of the mixers, then of the MLP, from cond (b, d) or the shared table (b, 1, 3 m, d)."""
        if hasattr(self, "adaln"):
            table = self.adaln(F.silu(cond))[:, None].unflatten(-1, (-1, cond.shape[-1]))
        else:
            table = self.adaln_table + cond
        gates, gains, shifts = (part.unbind(2) for part in table.unflatten(2, (3, -1)).unbind(2))
        return [Modulation(gate, 1 + gain, shift) for gate, gain, shift in zip(gates, gains, shifts, strict=True)]

    def forward(
        self, x: Tensor, cond: Tensor | None, shapes: tuple[Shape, ...], state: BlockState | None = None
    ) -> tuple[Tensor, BlockState]:
        """Tokens x (b, l, d) of steps of these shapes; `cond` to begin an image, `state` to continue one."""
        if state is None:
            assert cond is not None
            state = BlockState(self.modulation(cond), (None,) * len(self.mixers))
        *of_mixers, of_mlp = state.modulation
        carried, entered = [], x
        for mixer, before, (gate, gain, shift) in zip(self.mixers, state.mixers, of_mixers, strict=True):
            y, after = mixer(modulated(entered if self.config.parallel else x, gain, shift), shapes, before)
            x = torch.addcmul(x, self.drop_path(gate), y)
            carried.append(after)
        x = torch.addcmul(x, self.drop_path(of_mlp.gate), self.mlp(modulated(x, of_mlp.gain, of_mlp.shift)))
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
        self.start_embed = nn.Parameter(torch.empty(1, config.step_lengths[0], d))
        self.scale_embed = nn.Embedding(schedule.num_scales, d)
        self.pos_embed = nn.Parameter(torch.empty(1, schedule.num_tokens, d))
        self.input_proj = nn.Linear(config.code_dim, d)
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(d, 3 * (len(config.mixers_of(0)) + 1) * d)
        last = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(Block(config, i, config.drop_path * i / last) for i in range(config.depth))
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
            scale_inputs: (b, l - n, c) what `teacher_inputs` gives for the image's tokens, the first step having n.
            tokens: (b, l) int64, the image's own.

        Returns:
            (b, l, v) float32 logits; those of step k depend on tokens of steps before k only. With `tokens`, what
            `score` gives: all logits are then never in memory at once.
        """
        cond = self.class_embed(labels)  # (b, d)
        x = torch.cat([self.start(cond), self.project(scale_inputs)], dim=1)  # (b, l, d)
        x = x + self.positions(0, self.config.schedule.num_tokens)
        block_cond = self.block_cond(cond)
        for block in self.blocks:
            x, _ = block(x, block_cond, self.config.step_shapes)
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
        """State before the first step, for images of `labels` (b,) int64 in [0, num_classes]."""
        return MVARState(0, self.class_embed(labels), [None] * self.config.depth)

    def step(self, scale_inputs: Tensor | None, state: MVARState) -> tuple[Tensor, MVARState]:
        """One step, continuing where `state` ends; the steps together equal `forward`.

        Args:
            scale_inputs: (b, n, c) input of the n tokens of step k, those of a scale or one; None for the first.
            state: as returned by `init_state` or the step before.

        Returns:
            (b, n, v) float32 logits of step k, and the state for the next.
        """
        k, lengths = state.step, self.config.step_lengths
        begin = sum(lengths[:k])
        x = self.start(state.cond) if scale_inputs is None else self.project(scale_inputs)
        x = x + self.positions(begin, begin + lengths[k])
        block_cond = self.block_cond(state.cond) if k == 0 else None
        blocks: list[BlockState | None] = []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x, after = block(x, block_cond, self.config.step_shapes[k : k + 1], before)
            blocks.append(after)
        return self.logits(x, state.cond), MVARState(k + 1, state.cond, blocks)

    def start(self, cond: Tensor) -> Tensor:
        """(b, n, d) for the n tokens of the first step: the class embedding stands where no step precedes."""
        return cond[:, None] + self.start_embed

    def project(self, scale_inputs: Tensor) -> Tensor:
        """(b, l, c) -> (b, l, d); a frozen tokenizer may be in another dtype than the network."""
        return self.input_proj(scale_inputs.to(self.input_proj.weight.dtype))

    def positions(self, begin: int, end: int) -> Tensor:
        """(1, end - begin, d): scale and position embeddings of consecutive tokens."""
        schedule = self.config.schedule
        scales = enumerate(zip(schedule.offsets, schedule.lengths, strict=True))
        counts = {k: min(end, offset + length) - max(begin, offset) for k, (offset, length) in scales}
        scale_embed = torch.cat([self.scale_embed.weight[k].expand(n, -1) for k, n in counts.items() if n > 0])
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
            x = modulated(x.float(), 1 + gain, shift)
            return F.linear(x, *float_parameters(self.head))

    def lower(self, dtype: torch.dtype) -> MVAR:
        """Casts the weights in place, to sample with less memory and time; `KEEP_FLOAT32` and the head stay float32."""
        exact = {
            name: p.data
            for name, p in self.named_parameters()
            if name.endswith(KEEP_FLOAT32) or name.startswith("head")
        }
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
        elif isinstance(module, Mixer):
            module.reset_own_parameters()
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            nn.init.zeros_(module.bias)


def modulated(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """AdaLN of x (b, l, d): LayerNorm without learned affine, then gain and shift, each (b, 1, d)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), gain)


def float_parameters(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.float(), linear.bias.float()
