"""Token mixers that attend: inside a scale, inside a window, to coarser scales (see `models.base` for the contract)."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.models.base import Mixer, State
from lightning_mvar.ops.attention import attend_block_causal, attend_previous, attend_window, attend_within_scales
from lightning_mvar.scales import Shape, lengths_of

INITIAL_QK_SCALE, MAX_QK_SCALE = 4.0, 100.0


class Attention(Mixer):
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
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        self.q_bias.zero_()
        self.v_bias.zero_()
        if self.qk_scale_log is not None:
            self.qk_scale_log.fill_(math.log(INITIAL_QK_SCALE))

    def forward(self, x: Tensor, shapes: tuple[Shape, ...], state: State = None) -> tuple[Tensor, State]:
        q, k, v = self.queries_keys_values(x)
        y, state = self.attend(q, k, v, shapes, state)  # the kernels sum the softmax in float32
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
    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        """(b, h, l, p) queries, keys and values of the scales of these shapes -> (b, h, l, p), and what to carry on."""


class ScaleAttention(Attention):
    """Bidirectional attention inside each scale. Carries nothing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        return attend_within_scales(q, k, v, lengths_of(shapes), self.softmax_scale), None


class WindowAttention(Attention):
    """Attention inside each scale to the tokens in a window x window square around. Carries nothing."""

    def __init__(self, width: int, heads: int, qk_norm: bool, window: int) -> None:
        super().__init__(width, heads, qk_norm)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        return attend_window(q, k, v, shapes, self.window, self.softmax_scale), None


class BlockCausalAttention(Attention):
    """Attention to the own scale and all coarser ones. Carries the keys and values seen so far, each (b, h, l, p)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        return attend_block_causal(q, k, v, lengths_of(shapes), self.softmax_scale), (k, v)


class MarkovAttention(Attention):
    """Attention to the own scale and the one before. Carries that one's keys and values, each (b, h, n, p)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        lengths = lengths_of(shapes)
        last = slice(k.shape[2] - lengths[-1], None)
        return attend_previous(q, k, v, lengths, self.softmax_scale), (k[:, :, last], v[:, :, last])
