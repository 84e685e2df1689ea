"""The token mixers that a block is built from.

Every mixer is a module called as `y, state = mixer(x, lengths, state)`:

- x (b, l, d): the tokens of one or more consecutive scales, y (b, l, d) likewise;
- lengths: the number of tokens of each of those scales, l = sum(lengths);
- state: what the mixer carries from earlier scales, as it returned it; None before the first scale.

One call over all scales equals a call for each scale with the state handed on, which is what lets the sampler take one
scale at a time without running a prefix again.

| paper                             | name there             | here                                       |
|-----------------------------------|------------------------|--------------------------------------------|
| M-VAR, arXiv 2411.10433, sec. 3.2 | intra-scale attention  | ScaleAttention                             |
| M-VAR, arXiv 2411.10433, sec. 3.3 | inter-scale Mamba      | Mamba2                                     |
| VAR, arXiv 2404.02905, sec. 3.2   | block-causal attention | BlockCausalAttention                       |
| Mamba-2, arXiv 2405.21060, sec. 7 | Mamba-2 block          | Mamba2: in_proj, conv1d, A_log, ... as in  |
|                                   |                        | the weights of `mamba_ssm.Mamba2`          |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.ops.attention import attend_block_causal, attend_within_scales
from lightning_mvar.ops.conv import causal_conv
from lightning_mvar.ops.ssd import ssd

State = tuple[Tensor, ...] | None

INITIAL_QK_SCALE, MAX_QK_SCALE = 4.0, 100.0


class Attention(nn.Module, ABC):
    """Multi-head attention projections with optional QK-norm; subclasses say which tokens see which.

    With QK-norm, queries and keys are L2-normalised and the softmax has a learned temperature per head (starting at 4);
    without, the softmax scale is 0.25 / sqrt(p), as in VAR.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))  # a bias on the keys would cancel in the softmax
        self.v_bias = nn.Parameter(torch.empty(width))
        self.qk_scale_log = nn.Parameter(torch.empty(heads)) if qk_norm else None
        self.softmax_scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // heads)
        self.proj = nn.Linear(width, width)
        self.reset_bias_and_scale()

    @torch.no_grad()
    def reset_bias_and_scale(self) -> None:
        self.q_bias.zero_()
        self.v_bias.zero_()
        if self.qk_scale_log is not None:
            self.qk_scale_log.fill_(math.log(INITIAL_QK_SCALE))

    def forward(self, x: Tensor, lengths: tuple[int, ...], state: State = None) -> tuple[Tensor, State]:
        q, k, v = self.queries_keys_values(x)
        y, state = self.attend(q, k, v, lengths, state)  # the kernels sum the softmax in float32
        return self.proj(y.transpose(1, 2).flatten(2)), state

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (b, l, d) -> (b, h, l, p) each, normalised and scaled where there is QK-norm."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (b, h, l, p) each
        if self.qk_scale_log is not None:
            # In float32: a temperature of up to 100 would multiply the rounding of unit vectors in half precision.
            scale = self.qk_scale_log.float().clamp(max=math.log(MAX_QK_SCALE)).exp()[:, None, None]
            q = (F.normalize(q.float(), dim=-1) * scale).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], state: State) -> tuple[Tensor, State]:
        """(b, h, l, p) queries, keys and values of the scales in `lengths` -> (b, h, l, p), and what to carry on."""


class ScaleAttention(Attention):
    """Bidirectional attention inside each scale. Carries nothing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], state: State) -> tuple[Tensor, State]:
        return attend_within_scales(q, k, v, lengths, self.softmax_scale), None


class BlockCausalAttention(Attention):
    """Attention to the own scale and all coarser ones. Carries the keys and values seen so far, each (b, h, l, p)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], state: State) -> tuple[Tensor, State]:
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        return attend_block_causal(q, k, v, lengths, self.softmax_scale), (k, v)


class Mamba2(nn.Module):
    """Mamba-2 over the whole packed sequence, causal token by token; weights are named as in `mamba_ssm.Mamba2`.

    Carries the last conv_width - 1 inputs of the convolution (b, conv_width - 1, channels) and the state of the scan
    (b, h, p, n) in float32: the same size whatever the number of tokens seen.

    Args:
        width: d, the width of the tokens.
        state_dim: n, the SSM state of each channel.
        conv_width: taps of the causal depthwise convolution.
        expand: inner width over `width`.
        head_dim: p; the inner width must be a multiple of it.
    """

    def __init__(
        self, width: int, state_dim: int = 64, conv_width: int = 4, expand: int = 2, head_dim: int = 64
    ) -> None:
        super().__init__()
        self.inner, self.state_dim, self.head_dim = expand * width, state_dim, head_dim
        heads = self.inner // head_dim
        conv_channels = self.inner + 2 * state_dim  # x, B and C
        self.in_proj = nn.Linear(width, self.inner + conv_channels + heads, bias=False)
        self.conv1d = nn.Conv1d(conv_channels, conv_channels, conv_width, groups=conv_channels)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        """A uniform in [1, 16]; dt log-uniform in [dt_min, dt_max], stored as the inverse of softplus; D one."""
        self.A_log.uniform_(1.0, 16.0).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.D.fill_(1.0)

    def forward(self, x: Tensor, lengths: tuple[int, ...], state: State = None) -> tuple[Tensor, State]:
        conv_state, scan_state = state if state is not None else (None, None)
        z, xBC, dt = self.in_proj(x).split([self.inner, self.conv1d.in_channels, len(self.A_log)], dim=-1)
        xBC, conv_state = self.convolve(xBC, conv_state)
        u, B, C = F.silu(xBC).split([self.inner, self.state_dim, self.state_dim], dim=-1)
        u = u.unflatten(-1, (-1, self.head_dim))  # (b, l, h, p)
        # Step sizes and decays in float32: their products run over the whole sequence.
        dt = F.softplus(dt.float() + self.dt_bias.float())
        y, scan_state = ssd(u, dt, -self.A_log.float().exp(), B, C, scan_state)
        y = torch.addcmul(y, u, self.D[:, None].to(u.dtype))
        return self.out_proj(self.gated_norm(y.flatten(2), z)), (conv_state, scan_state)

    def gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """norm(y silu(z)) of (b, l, inner), in float32: the product can pass the 65504 of float16."""
        y = y.float() * F.silu(z.float())
        return F.rms_norm(y, self.norm.normalized_shape, self.norm.weight.float(), self.norm.eps).to(z.dtype)

    def convolve(self, xBC: Tensor, conv_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution of (b, l, channels), continuing after the inputs in `conv_state`."""
        past = self.conv1d.kernel_size[0] - 1
        xBC = F.pad(xBC, (0, 0, past, 0)) if conv_state is None else torch.cat([conv_state, xBC], dim=1)
        assert self.conv1d.bias is not None
        return causal_conv(xBC, self.conv1d.weight[:, 0], self.conv1d.bias), xBC[:, xBC.shape[1] - past :]
