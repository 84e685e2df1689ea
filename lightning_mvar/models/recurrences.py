"""Recurrent token mixers, which carry a fixed-size state over the packed sequence (contract: `models.base`).

Scales are read coarse to fine. Inside a scale, a token sees the tokens read before it; that reading order is an option.

| paper                                     | here                                                          |
|-------------------------------------------|---------------------------------------------------------------|
| Mamba-2, arXiv 2405.21060, section 7      | Mamba2: in_proj, conv1d, A_log, ... as in `mamba_ssm.Mamba2`  |
| Mamba, arXiv 2312.00752, section 3.4      | Mamba1, likewise, except that the bias of dt_proj is dt_bias  |
| RetNet, arXiv 2307.08621, section 2.2;    | LinearAttention: the decay of RWKV-5, learned per key         |
| RWKV-5, arXiv 2404.05892, section 4       | channel and equal for all tokens                              |
| GLA, arXiv 2312.06635, section 4          | GatedLinearAttention: the decay depends on the token          |
| Vision Mamba, arXiv 2401.09417, section 3 | ScaleMamba: a forward and a backward scan inside each scale   |

At equal expansion, head dim p and state dim n, all states have the same size: (b, h, p, n) with h p = expand d, or
(b, expand d, n) in Mamba1.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.models.base import Mixer, State
from lightning_mvar.ops.conv import convolve
from lightning_mvar.ops.linear_attention import MIN_LOG_DECAY, linear_attention
from lightning_mvar.ops.mamba2 import Mamba2Parameters, mamba2
from lightning_mvar.ops.neighbors import reading_order
from lightning_mvar.ops.selective_scan import selective_scan
from lightning_mvar.scales import Shape, lengths_of

RASTER = ("raster",)
GATE_RANK, GATE_TEMPERATURE = 16, 16.0  # for GatedLinearAttention
NORM_EPS = 1e-5
MIN_INITIAL_DECAY, MAX_INITIAL_DECAY = 1e-3, 0.5  # per token, for LinearAttention


class Recurrence(Mixer):
    """Runs one scan per reading order with shared weights and averages the outputs.

    Args:
        orders: reading orders, see `reading_order`; each has a separate state.
    """

    def __init__(self, orders: tuple[str, ...] = RASTER) -> None:
        super().__init__()
        self.orders = orders

    def forward(self, x: Tensor, shapes: tuple[Shape, ...], state: State = None) -> tuple[Tensor, State]:
        size = 0 if state is None else len(state) // len(self.orders)
        outputs: list[Tensor] = []
        new_state: tuple[Tensor, ...] = ()
        for i, order in enumerate(self.orders):
            reading = reading_order(shapes, order, x.device)
            ordered = x if reading is None else x[:, reading[0]]
            y, order_state = self.scan(ordered, None if state is None else state[i * size : (i + 1) * size])
            outputs.append(y if reading is None else y[:, reading[1]])
            new_state += order_state
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0), new_state

    @abstractmethod
    def scan(self, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scans tokens x (b, l, d) in reading order; returns (b, l, d) and the next state."""


class Mamba2(Recurrence):
    """Mamba-2 over the packed sequence, causal per token; weights are named as in `mamba_ssm.Mamba2`.

    The state is the last conv_width - 1 inputs of the convolution (b, conv_width - 1, channels) and the SSM state
    (b, h, p, n) in float32; its size does not depend on the number of tokens.

    Args:
        width: d, the width of the tokens.
        state_dim: n, SSM state size per channel.
        conv_width: number of taps of the causal depthwise convolution.
        expand: inner width as a multiple of `width`.
        head_dim: p; must divide the inner width.
        orders: reading orders of the tokens.
    """

    def __init__(
        self,
        width: int,
        state_dim: int = 64,
        conv_width: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        orders: tuple[str, ...] = RASTER,
    ) -> None:
        super().__init__(orders)
        self.inner, self.state_dim, self.head_dim = expand * width, state_dim, head_dim
        heads = self.inner // head_dim
        conv_channels = self.inner + 2 * state_dim  # x, B and C
        self.in_proj = nn.Linear(width, self.inner + conv_channels + heads, bias=False)
        self.conv1d = nn.Conv1d(conv_channels, conv_channels, conv_width, groups=conv_channels)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = nn.RMSNorm(self.inner, eps=NORM_EPS)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Draws A uniformly in [1, 16] and dt as in `draw_dt_bias`; sets D and the norm weight to 1."""
        self.A_log.uniform_(1.0, 16.0).log_()
        draw_dt_bias(self.dt_bias)
        self.D.fill_(1.0)
        self.norm.weight.fill_(1.0)

    def scan(self, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, new_state = mamba2(self.in_proj(x), self.inner_parameters(), state, NORM_EPS)
        return self.out_proj(y), new_state

    def inner_parameters(self) -> Mamba2Parameters:
        """Returns the parameters between the two projections."""
        conv_bias = self.conv1d.bias
        assert conv_bias is not None
        conv_weight = self.conv1d.weight.flatten(1)  # (c, w)
        return Mamba2Parameters(conv_weight, conv_bias, self.dt_bias, self.A_log, self.D, self.norm.weight)


class Mamba1(Recurrence):
    """Mamba-1, with a separate decay per channel and state; causal per token.

    The state is the last conv_width - 1 inputs of the convolution (b, conv_width - 1, inner) and the SSM state
    (b, inner, n) in float32. Arguments as in `Mamba2`.
    """

    def __init__(
        self, width: int, state_dim: int = 16, conv_width: int = 4, expand: int = 2, orders: tuple[str, ...] = RASTER
    ) -> None:
        super().__init__(orders)
        self.inner, self.state_dim, self.dt_rank = expand * width, state_dim, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, conv_width, groups=self.inner)
        self.x_proj = nn.Linear(self.inner, self.dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Parameter(torch.empty(self.inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log = nn.Parameter(torch.empty(self.inner, state_dim))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Sets A to 1..n in each channel (S4D-real) and D to 1; draws dt as in `draw_dt_bias`."""
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, device=self.A_log.device).log())
        draw_dt_bias(self.dt_bias)
        self.dt_proj.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.D.fill_(1.0)

    def scan(self, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        conv_state, scan_state = state if state is not None else (None, None)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        assert self.conv1d.bias is not None
        u, conv_state = convolve(u, self.conv1d.weight.flatten(1), self.conv1d.bias, conv_state)
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_proj.to(dt.dtype)).float() + self.dt_bias.float())
        # In float32 through the gate, as in `gated_rms_norm`.
        y, scan_state = selective_scan(u.float(), dt, -self.A_log.float().exp(), B, C, scan_state)
        y = torch.addcmul(y, u.float(), self.D.float()) * F.silu(z.float())
        return self.out_proj(y.to(z.dtype)), (conv_state, scan_state)


class LinearAttention(Recurrence):
    """Linear attention with a learned decay per key channel; outputs are normalized per head, then gated.

    The state is (b, h, p, n) in float32.

    Args:
        width: d, the width of the tokens.
        state_dim: n, key channels per head.
        expand: total width of the values as a multiple of `width`.
        head_dim: p, value channels per head.
        orders: reading orders of the tokens.
    """

    def __init__(
        self, width: int, state_dim: int = 64, expand: int = 2, head_dim: int = 64, orders: tuple[str, ...] = RASTER
    ) -> None:
        super().__init__(orders)
        self.inner, self.state_dim, self.head_dim = expand * width, state_dim, head_dim
        self.heads = self.inner // head_dim
        self.in_proj = nn.Linear(width, 2 * self.heads * state_dim + 2 * self.inner, bias=False)  # q, k, v and z
        self.norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.add_decay_parameters(width)
        self.reset_own_parameters()

    def add_decay_parameters(self, width: int) -> None:
        self.decay_log = nn.Parameter(torch.empty(self.heads, self.state_dim))

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Draws decays log-uniformly in [MIN_INITIAL_DECAY, MAX_INITIAL_DECAY]; sets the norm weight to 1."""
        self.decay_log.uniform_(math.log(MIN_INITIAL_DECAY), math.log(MAX_INITIAL_DECAY))
        self.norm.weight.fill_(1.0)

    def log_decay(self, x: Tensor) -> Tensor:
        """Returns float32, broadcastable to (b, l, h, n), in [MIN_LOG_DECAY, 0]."""
        return -self.decay_log.float().exp().clamp(max=-MIN_LOG_DECAY)

    def scan(self, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        keys = self.heads * self.state_dim
        q, k, v, z = self.in_proj(x).split([keys, keys, self.inner, self.inner], dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        old_state = None if state is None else state[0]
        y, new_state = linear_attention(q * self.state_dim**-0.5, k, v.float(), self.log_decay(x), old_state)
        y = F.rms_norm(y, self.norm.normalized_shape, self.norm.weight.float(), self.norm.eps)  # in float32
        return self.out_proj(y.flatten(2).to(z.dtype) * F.silu(z)), (new_state,)


class GatedLinearAttention(LinearAttention):
    """Linear attention with a token-dependent decay per key channel."""

    def add_decay_parameters(self, width: int) -> None:
        keys = self.heads * self.state_dim
        self.gate = nn.Sequential(nn.Linear(width, GATE_RANK, bias=False), nn.Linear(GATE_RANK, keys))

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        self.norm.weight.fill_(1.0)

    def log_decay(self, x: Tensor) -> Tensor:
        """Returns log(sigmoid(gate) ** (1 / GATE_TEMPERATURE)), (b, l, h, n)."""
        gate = F.logsigmoid(self.gate(x).float()) / GATE_TEMPERATURE
        return gate.clamp(min=MIN_LOG_DECAY).unflatten(-1, (self.heads, -1))


class ScaleMamba(Mixer):
    """Forward and backward Mamba-2 inside each scale, with separate weights. Stateless.

    Arguments as in `Mamba2`.
    """

    def __init__(self, width: int, state_dim: int, conv_width: int, expand: int, head_dim: int) -> None:
        super().__init__()
        self.forwards = Mamba2(width, state_dim, conv_width, expand, head_dim)
        self.backwards = Mamba2(width, state_dim, conv_width, expand, head_dim, ("reversed",))

    def forward(self, x: Tensor, shapes: tuple[Shape, ...], state: State = None) -> tuple[Tensor, State]:
        scales = list(zip(x.split(lengths_of(shapes), dim=1), shapes, strict=True))
        outputs = [
            torch.cat([mamba(scale, (shape,))[0] for scale, shape in scales], dim=1)
            for mamba in (self.forwards, self.backwards)
        ]
        return outputs[0] + outputs[1], None


def draw_dt_bias(dt_bias: Tensor) -> None:
    """Draws dt log-uniformly in [0.001, 0.1] and stores its inverse softplus in place."""
    dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
