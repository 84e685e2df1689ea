"""The scale-by-scale network: M-VAR, VAR, and any other choice of mixers.

Papers: M-VAR (arXiv 2411.10433), VAR (arXiv 2404.02905).

| paper / published code          | here              | meaning                                                  |
|---------------------------------|-------------------|----------------------------------------------------------|
| patch_nums                      | side_lengths      | side of each token map, coarse to fine                   |
| x_BLCv_wo_first_l               | scale_inputs      | teacher-forcing input of every scale but the first       |
| pos_start, pos_1LC, lvl_embed   | start_embed, pos_embed, scale_embed | added to the input tokens              |
| gamma, 1 + scale, shift (AdaLN) | gate, gain, shift | per-channel modulation of a residual branch by the class |
| sos / cond_BD                   | cond              | class embedding: first token, and input of the AdaLN     |

Shapes: b batch, l tokens, d width, k scale, v vocabulary, c code dim, m branches of a block (mixers and MLP), n tokens
of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.devices import without_autocast
from lightning_mvar.models.attention import Attention
from lightning_mvar.models.base import Mixer, State
from lightning_mvar.models.config import MIXERS, MVARConfig
from lightning_mvar.models.scoring import draw_in_parts, score_in_parts
from lightning_mvar.ops.adaln import add_and_modulate, add_gated, modulate
from lightning_mvar.ops.kernels import look_for_kernels
from lightning_mvar.ops.recompute import Recipes, cheap, recomputation
from lightning_mvar.scales import Shape


class AdaLN(NamedTuple):
    """AdaLN parameters of one residual branch, each (b, 1, d): output gate, input gain, input shift."""

    gate: Tensor
    gain: Tensor
    shift: Tensor


@dataclass
class BlockState:
    """State of a block from step to step while an image is sampled."""

    adaln: list[AdaLN]  # one per mixer, then the MLP's; constant
    mixers: tuple[State, ...]

    def first(self, count: int) -> BlockState:
        """Returns the state of the first `count` images."""
        adaln = [AdaLN(*(parameter[:count] for parameter in branch)) for branch in self.adaln]
        return BlockState(adaln, tuple(state and tuple(tensor[:count] for tensor in state) for state in self.mixers))


@dataclass
class MVARState:
    """State of the network while images are sampled: number of the next step, cond (b, d), state of each block.

    A block has no state before the first step, which computes its AdaLN parameters.
    """

    step: int
    cond: Tensor
    blocks: list[BlockState | None]

    def first(self, count: int) -> MVARState:
        """Returns the state of the first `count` images; a view."""
        return MVARState(self.step, self.cond[:count], [block and block.first(count) for block in self.blocks])


class Block(nn.Module):
    """Mixers, then an MLP, each a residual branch: x + drop_path(gate * branch(LayerNorm(x) * gain + shift))."""

    def __init__(self, config: MVARConfig, number: int) -> None:
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

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        shapes: tuple[Shape, ...],
        state: BlockState | None = None,
        drop_path: Tensor | None = None,
    ) -> tuple[Tensor, BlockState]:
        """Runs the block on the tokens of one or more consecutive steps, continuing from `state`.

        Args:
            x: (b, l, d).
            cond: (b, d), or (b, 1, 3 m, d) with shared AdaLN; read only without a `state`, at the start of an image.
            shapes: height and width of each step's token map, l tokens in total.
            state: as returned by the previous call; None at the start of an image.
            drop_path: (b, 1, m, 1) gate factors from `draw_drop_path`; None to keep all branches.

        Returns:
            (b, l, d), and the next state.
        """
        state = state or BlockState(self.adaln_parameters(cond, drop_path), (None,) * len(self.mixers))
        adaln, carried, entered, dtype = state.adaln, [], x, product_dtype(x)
        normed = cheap(modulate, x, adaln[0].gain, adaln[0].shift, dtype)  # (b, l, d)
        for i, (mixer, before) in enumerate(zip(self.mixers, state.mixers, strict=True)):
            y, after = mixer(normed, shapes, before)  # (b, l, d)
            carried.append(after)
            gate, (_, gain, shift) = adaln[i].gate, adaln[i + 1]  # this branch's output, the next branch's input
            if self.config.parallel and i + 1 < len(self.mixers):  # the next mixer also reads the block's input
                x = add_gated(x, gate, y)  # (b, l, d)
                normed = cheap(modulate, entered, gain, shift, dtype)  # (b, l, d)
            else:
                x, normed = add_and_modulate(x, gate, y, gain, shift, dtype)  # (b, l, d) each
        hidden = self.mlp[0](normed)  # (b, l, 4 d)
        y = self.mlp[2](cheap(self.mlp[1], hidden))  # (b, l, d)
        x = add_gated(x, adaln[-1].gate, y)  # (b, l, d)
        return x, BlockState(adaln, tuple(carried))

    def adaln_parameters(self, cond: Tensor, drop_path: Tensor | None = None) -> list[AdaLN]:
        """Computes the AdaLN parameters of mixers and MLP from the class alone; drop path closes gates."""
        if self.config.shared_adaln:
            table = self.adaln_table + cond  # (b, 1, 3 m, d)
        else:
            table = self.adaln(F.silu(cond))[:, None].unflatten(-1, (-1, cond.shape[-1]))  # (b, 1, 3 m, d)
        gates, gains, shifts = table.unflatten(2, (3, -1)).unbind(2)  # (b, 1, m, d) each
        if drop_path is not None:
            gates = (gates * drop_path).to(gates.dtype)
        branches = zip(gates.unbind(2), (1 + gains).unbind(2), shifts.unbind(2), strict=True)  # m times (b, 1, d)
        return [AdaLN(*parameters) for parameters in branches]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initializes in place: small writes to the residual stream, the first two gates nearly closed."""
        d, output_scale = self.config.width, 1 / math.sqrt(2 * self.config.depth)
        init_part(self, weight_std(d))
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
    """Next-scale prediction: logits of all tokens of a scale from the scales before it and the class."""

    def __init__(self, config: MVARConfig) -> None:
        super().__init__()
        self.config = config
        schedule, d = config.schedule, config.width
        self.class_embed = nn.Embedding(config.num_classes + 1, d)
        self.start_embed = nn.Parameter(torch.empty(1, config.step_lengths[0], d))
        self.scale_embed = nn.Embedding(schedule.num_scales, d)
        self.pos_embed = nn.Parameter(torch.empty(1, schedule.num_tokens, d))
        self.input_proj = nn.Linear(config.code_dim, d)
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(d, 3 * (len(config.mixers_of(0)) + 1) * d)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.head_adaln = nn.Linear(d, 2 * d)
        self.head = nn.Linear(d, config.vocab_size)
        self.init_weights()
        if self.start_embed.is_cuda:
            look_for_kernels()

    def _apply(self, *arguments: Any, **options: Any) -> MVAR:
        """Moves or casts the network, for methods such as `to` and `half`; looks for kernels once it is on a GPU."""
        super()._apply(*arguments, **options)
        if self.start_embed.is_cuda:
            look_for_kernels()
        return self

    def forward(self, labels: Tensor, scale_inputs: Tensor) -> Tensor:
        """Computes teacher-forced logits of all scales at once.

        Args:
            labels: (b,) int64 in [0, num_classes]; `num_classes` is unconditional.
            scale_inputs: (b, l - n, c) from `teacher_inputs`; the n tokens of the first step have none.

        Returns:
            (b, l, v) float32; logits of step k depend only on tokens of steps before k.
        """
        x, cond = self.hidden(labels, scale_inputs)  # (b, l, d), (b, d)
        return self.logits(x, cond)  # (b, l, v)

    def score(
        self, labels: Tensor, scale_inputs: Tensor, tokens: Tensor, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Scores tokens (b, l) with the logits that `forward` computes; see `score_in_parts`."""
        x, cond = self.hidden(labels, scale_inputs)  # (b, l, d), (b, d)
        return score_in_parts(self.logits, x, cond, tokens, self.config.vocab_size, label_smoothing)  # (b, l), (b, l)

    def redraw(self, labels: Tensor, scale_inputs: Tensor, uniforms: Tensor) -> Tensor:
        """Draws each token (b, l) conditioned on the image's own earlier scales; see `draw_in_parts`."""
        x, cond = self.hidden(labels, scale_inputs)  # (b, l, d), (b, d)
        return draw_in_parts(self.logits, x, cond, uniforms, self.config.vocab_size)  # (b, l)

    def hidden(self, labels: Tensor, scale_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Runs all blocks over all scales; returns x (b, l, d) and cond (b, d)."""
        cond = self.class_embed(labels)  # (b, d)
        x = torch.cat([self.start(cond), self.project(scale_inputs)], dim=1)  # (b, l, d)
        x = x + self.positions(0, self.config.schedule.num_tokens)  # (b, l, d)
        block_cond = self.block_cond(cond)  # (b, d) or (b, 1, 3 m, d)
        # Not on a CPU, where memory suffices and a step would take 3 to 8 % longer.
        with recomputation(Recipes() if x.is_cuda and torch.is_grad_enabled() else None):
            for block, drop_path in zip(self.blocks, self.draw_drop_path(x), strict=True):
                x, _ = block(x, block_cond, self.config.step_shapes, drop_path=drop_path)  # (b, l, d)
        return x, cond

    def draw_drop_path(self, x: Tensor) -> Sequence[Tensor | None]:
        """Draws drop path (stochastic depth) for all blocks, outside them so that one compiled graph serves any rate.

        Returns:
            One tensor of gate factors (b, 1, m, 1) float32 per block: 1 / (1 - rate) for a branch that is kept, else 0.
            None for each block in eval mode or without drop path.
        """
        if not self.training or self.config.drop_path == 0:
            return [None] * self.config.depth
        factors = []
        for i in range(self.config.depth):
            kept = x.new_ones(len(self.config.mixers_of(i)) + 1, len(x), dtype=torch.float32)  # (m, b)
            share = 1 - self.config.drop_path_of(i)
            for branch in kept if share < 1 else ():
                branch.bernoulli_(share).div_(share)
            factors.append(kept.t()[:, None, :, None])
        return factors

    def init_state(self, labels: Tensor) -> MVARState:
        """Returns the state before the first step.

        Args:
            labels: (b,) int64 in [0, num_classes], or (b, num_classes + 1) float weights that mix class embeddings.
        """
        if not labels.is_floating_point():
            return MVARState(0, self.class_embed(labels), [None] * self.config.depth)
        with without_autocast(labels):
            cond = labels.to(self.class_embed.weight.dtype) @ self.class_embed.weight  # (b, d)
        return MVARState(0, cond, [None] * self.config.depth)

    def step(self, scale_inputs: Tensor | None, state: MVARState) -> tuple[Tensor, MVARState]:
        """Runs one step, continuing from `state`; all steps together equal `forward`.

        Args:
            scale_inputs: (b, n, c) inputs of the step's n tokens, a scale or a single token; None in the first step.
            state: as returned by `init_state` or by the previous step.

        Returns:
            (b, n, v) float32 logits of the step, and the state for the next.
        """
        k, begin = state.step, sum(self.config.step_lengths[: state.step])
        x = self.start(state.cond) if scale_inputs is None else self.project(scale_inputs)  # (b, n, d)
        x = x + self.positions(begin, begin + self.config.step_lengths[k])  # (b, n, d)
        block_cond = self.block_cond(state.cond) if k == 0 else state.cond
        blocks: list[BlockState | None] = []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x, after = block(x, block_cond, self.config.step_shapes[k : k + 1], before)  # (b, n, d)
            blocks.append(after)
        return self.logits(x, state.cond), MVARState(k + 1, state.cond, blocks)

    def start(self, cond: Tensor) -> Tensor:
        """Returns the input (b, n, d) of the first step, which no tokens precede: the class embedding."""
        return cond[:, None] + self.start_embed

    def project(self, scale_inputs: Tensor) -> Tensor:
        """Projects (b, l, c) -> (b, l, d); a frozen tokenizer may have another dtype than the network."""
        return self.input_proj(scale_inputs.to(self.input_proj.weight.dtype))

    def positions(self, begin: int, end: int) -> Tensor:
        """Returns scale and position embeddings (1, end - begin, d) of consecutive tokens."""
        schedule = self.config.schedule
        scales = enumerate(zip(schedule.offsets, schedule.lengths, strict=True))
        counts = {k: min(end, offset + length) - max(begin, offset) for k, (offset, length) in scales}
        scale_embed = torch.cat([self.scale_embed.weight[k].expand(n, -1) for k, n in counts.items() if n > 0])
        return self.pos_embed[:, begin:end] + scale_embed

    def block_cond(self, cond: Tensor) -> Tensor:
        """Returns the input of the blocks' AdaLN: cond (b, d) itself, or its shared projection (b, 1, 3 m, d)."""
        if not self.config.shared_adaln:
            return cond
        return self.shared_adaln(F.silu(cond))[:, None].unflatten(-1, (-1, cond.shape[-1]))

    def logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """Computes (b, l, d) -> (b, l, v), in float32 even under autocast: small differences decide what is sampled."""
        with without_autocast(x):
            gain, shift = F.linear(F.silu(cond.float()), *float_parameters(self.head_adaln))[:, None].chunk(2, dim=-1)
            x = modulate(x.float(), 1 + gain, shift)  # (b, l, d)
            return F.linear(x, *float_parameters(self.head))  # (b, l, v)

    def init_weights(self) -> None:
        """Initializes every parameter in place (VAR, appendix; M-VAR keeps it)."""
        for block in self.blocks:
            block.init_weights()  # type: ignore[operator]
        self.init_outer_weights()

    @torch.no_grad()
    def init_outer_weights(self) -> None:
        """Initializes in place everything outside the blocks: embeddings, input projection, head."""
        std = weight_std(self.config.width)
        for name, module in self.named_children():
            if name != "blocks":
                init_part(module, std)
        nn.init.trunc_normal_(self.start_embed, std=std)
        nn.init.trunc_normal_(self.pos_embed, std=std)
        self.head.weight.mul_(0.02)
        self.head_adaln.weight.mul_(0.5)


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype to which a linear layer casts x (...): that of autocast, or its own."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else x.dtype


def float_parameters(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.float(), linear.bias.float()


def weight_std(width: int) -> float:
    return math.sqrt(1 / width / 3)


def init_part(part: nn.Module, std: float) -> None:
    """Draws weights from a normal truncated at +-2, sets biases to 0, and lets mixers initialize the rest."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, nn.Conv1d):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, Mixer):
            module.reset_own_parameters()
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            nn.init.zeros_(module.bias)
