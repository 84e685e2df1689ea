"""The token mixers that carry a state of fixed size over the packed sequence, token by token.

They are called as the mixers of `models.mixers` are. Inside a scale, a token sees those that the scan has read before
it: the order in which it reads them is a choice, that of the scales is not.

| paper                                     | here                                                          |
|-------------------------------------------|---------------------------------------------------------------|
| Mamba-2, arXiv 2405.21060, section 7      | Mamba2: in_proj, conv1d, A_log, ... as in `mamba_ssm.Mamba2`  |
| Mamba, arXiv 2312.00752, section 3.4      | Mamba1, likewise, but for dt_proj, whose bias is dt_bias      |
| RetNet, arXiv 2307.08621, section 2.2;    | LinearAttention: the decay of RWKV-5, learned for every key   |
| RWKV-5, arXiv 2404.05892, section 4       | channel and the same at all tokens                            |
| GLA, arXiv 2312.06635, section 4          | GatedLinearAttention: the decay depends on the token          |
| Vision Mamba, arXiv 2401.09417, section 3 | ScaleMamba: two scans inside each scale, one backwards        |

At the same expansion, head dim p and state dim n, the states of all but Mamba1 have the same size: (b, h, p, n) with
h p = expand d. Mamba1 has n numbers for each of its expand d channels, which is as many.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.models.base import Mixer, State
from lightning_mvar.ops.conv import causal_conv
from lightning_mvar.ops.gated_norm import gated_rms_norm
from lightning_mvar.ops.linear_attention import MIN_LOG_DECAY, linear_attention
from lightning_mvar.ops.neighbours import reading_order
from lightning_mvar.ops.selective_scan import selective_scan
from lightning_mvar.ops.ssd import ssd
from lightning_mvar.scales import Shape, lengths_of

RASTER = ("raster",)
GATE_RANK, GATE_TEMPERATURE = 16, 16.0  # of gated linear attention
NORM_EPS = 1e-5
SLOWEST, FASTEST = 1e-3, 0.5  # decay a token that linear attention starts from


class Recurrence(Mixer):
    """A scan over the tokens in one or more orders, with the same weights; the mean of what they give.

    Args:
        orders: see `reading_order`. Each carries a state of its own.
    """

    def __init__(self, orders: tuple[str, ...] = RASTER) -> None:
        super().__init__()
        self.orders = orders

    def forward(self, x: Tensor, shapes: tuple[Shape, ...], state: State = None) -> tuple[Tensor, State]:
        size = 0 if state is None else len(state) // len(self.orders)
        outputs: list[Tensor] = []
        carried: tuple[Tensor, ...] = ()
        for i, order in enumerate(self.orders):
            positions = reading_order(shapes, order, x.device)
            read = x if positions is None else x[:, positions]
            y, after = self.scan(read, None if state is None else state[i * size : (i + 1) * size])
            outputs.append(y if positions is None else y[:, positions.argsort()])
            carried += after
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0), carried

    @abstractmethod
    def scan(self, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens x (b, l, d) in the order in which they are read -> (b, l, d), and what to carry on."""


class Mamba2(Recurrence):
    """Mamba-2 over the whole packed sequence, causal token by token; weights are named as in `mamba_ssm.Mamba2`.

    Carries the last conv_width - 1 inputs of the convolution (b, conv_width - 1, channels) and the state of the scan
    (b, h, p, n) in float32: the same size whatever the number of tokens seen.

    Args:
        width: d, the width of the tokens.
        state_dim: n, the SSM state of each channel.
        conv_width: taps of the causal depthwise convolution.
        expand: inner width over `width`.
        head_dim: p; the inner width must be a multiple of it.
        orders: in which tokens are read.
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
        """A uniform in [1, 16]; dt as in `draw_dt_bias`; D and the norm's weight one."""
        self.A_log.uniform_(1.0, 16.0).log_()
        draw_dt_bias(self.dt_bias)
        self.D.fill_(1.0)
        self.norm.weight.fill_(1.0)

    def scan(self, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        conv_state, scan_state = state if state is not None else (None, None)
        z, xBC, dt = self.in_proj(x).split([self.inner, self.conv1d.in_channels, len(self.A_log)], dim=-1)
        xBC, conv_state = convolve(self.conv1d, xBC, conv_state)
        u, B, C = F.silu(xBC).split([self.inner, self.state_dim, self.state_dim], dim=-1)
        u = u.unflatten(-1, (-1, self.head_dim))  # (b, l, h, p)
        # Step sizes and decays in float32: their products run over the whole sequence.
        dt = F.softplus(dt.float() + self.dt_bias.float())
        y, scan_state = ssd(u, dt, -self.A_log.float().exp(), B, C, scan_state)
        y = torch.addcmul(y, u, self.D[:, None].to(u.dtype))
        y = gated_rms_norm(y.flatten(2), z, self.norm.weight, NORM_EPS)
        return self.out_proj(y), (conv_state, scan_state)


class Mamba1(Recurrence):
    """Mamba with a decay of its own for every channel and state; causal token by token.

    Carries the last conv_width - 1 inputs of the convolution (b, conv_width - 1, inner) and the state of the scan
    (b, inner, n) in float32. Arguments as of `Mamba2`.
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
        """A is 1 to n in every channel (S4D-real); dt as in `draw_dt_bias`; D one."""
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, device=self.A_log.device).log())
        draw_dt_bias(self.dt_bias)
        self.dt_proj.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.D.fill_(1.0)

    def scan(self, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        conv_state, scan_state = state if state is not None else (None, None)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv_state = convolve(self.conv1d, u, conv_state)
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_proj.to(dt.dtype)).float() + self.dt_bias.float())
        # In float32 up to the gate, as in `gated_rms_norm`.
        y, scan_state = selective_scan(u.float(), dt, -self.A_log.float().exp(), B, C, scan_state)
        y = torch.addcmul(y, u.float(), self.D.float()) * F.silu(z.float())
        return self.out_proj(y.to(z.dtype)), (conv_state, scan_state)


class LinearAttention(Recurrence):
    """Linear attention whose every key channel forgets at a learned rate; outputs normalised by head, then gated.

    Carries the state (b, h, p, n) in float32.

    Args:
        width: d, the width of the tokens.
        state_dim: n, key channels of a head.
        expand: width of all values together over `width`.
        head_dim: p, value channels of a head.
        orders: in which tokens are read.
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
        self.add_decay(width)
        self.reset_own_parameters()

    def add_decay(self, width: int) -> None:
        self.decay_log = nn.Parameter(torch.empty(self.heads, self.state_dim))

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Decays log-uniform in [SLOWEST, FASTEST] a token; the norm's weight one."""
        self.decay_log.uniform_(math.log(SLOWEST), math.log(FASTEST))
        self.norm.weight.fill_(1.0)

    def log_decay(self, x: Tensor) -> Tensor:
        """Float32 that broadcasts to (b, l, h, n), in [MIN_LOG_DECAY, 0]."""
        return -self.decay_log.float().exp().clamp(max=-MIN_LOG_DECAY)

    def scan(self, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        keys = self.heads * self.state_dim
        q, k, v, z = self.in_proj(x).split([keys, keys, self.inner, self.inner], dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        before = None if state is None else state[0]
        y, after = linear_attention(q * self.state_dim**-0.5, k, v.float(), self.log_decay(x), before)
        y = F.rms_norm(y, self.norm.normalized_shape, self.norm.weight.float(), self.norm.eps)  # in float32
        return self.out_proj(y.flatten(2).to(z.dtype) * F.silu(z)), (after,)


class GatedLinearAttention(LinearAttention):
    """Linear attention in which each token says how much every key channel forgets."""

    def add_decay(self, width: int) -> None:
        keys = self.heads * self.state_dim
        self.gate = nn.Sequential(nn.Linear(width, GATE_RANK, bias=False), nn.Linear(GATE_RANK, keys))

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        self.norm.weight.fill_(1.0)

    def log_decay(self, x: Tensor) -> Tensor:
        """The logarithm of sigmoid(gate) ** (1 / GATE_TEMPERATURE): (b, l, h, n)."""
        gate = F.logsigmoid(self.gate(x).float()) / GATE_TEMPERATURE
        return gate.clamp(min=MIN_LOG_DECAY).unflatten(-1, (self.heads, -1))


class ScaleMamba(Mixer):
    """Mamba-2 inside each scale, forwards and backwards, each with weights of its own. Carries nothing.

    Arguments as of `Mamba2`.
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


def draw_dt_bias(dt_bias: Tensor, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
    """In place: dt log-uniform in [dt_min, dt_max], stored as the inverse of softplus."""
    dt = torch.empty_like(dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def convolve(conv1d: nn.Conv1d, x: Tensor, conv_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution of (b, l, channels), continuing after the inputs in `conv_state`."""
    past = conv1d.kernel_size[0] - 1
    x = F.pad(x, (0, 0, past, 0)) if conv_state is None else torch.cat([conv_state, x], dim=1)
    assert conv1d.bias is not None
    return causal_conv(x, conv1d.weight[:, 0], conv1d.bias), x[:, x.shape[1] - past :]
