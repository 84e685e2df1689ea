"""Token mixers that attend inside a scale, inside a window or to coarser scales (contract: `models.base`)."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from lightning_mvar.models.base import Mixer, State
from lightning_mvar.ops.attention import attend_block_causal, attend_previous, attend_window, attend_within_scales
from lightning_mvar.ops.qk_norm import normalized_qkv, project_qkv
from lightning_mvar.scales import Shape, lengths_of

INITIAL_QK_SCALE = 4.0


class Attention(Mixer):
    """Multi-head attention projections with optional QK-norm; subclasses define which tokens attend to which.

    With QK-norm, queries and keys are L2-normalized and the softmax has a learned scale per head, initially 4. Without,
    the softmax scale is 0.25 / sqrt(p), as in VAR.
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
        y, state = self.attend(q, k, v, shapes, state)  # the kernels accumulate the softmax in float32
        return self.proj(y.transpose(1, 2).flatten(2)), state

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects tokens x (b, l, d) to q, k and v, each (b, h, l, p); normalizes q and k if QK-norm is on."""
        parameters = self.qkv.weight, self.q_bias, self.v_bias
        if self.qk_scale_log is None:
            return project_qkv(x, *parameters, self.heads)
        return normalized_qkv(x, *parameters, self.qk_scale_log)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        """Attends with q, k and v (b, h, l, p) of scales of these `shapes`; returns (b, h, l, p) and the next state."""


class ScaleAttention(Attention):
    """Bidirectional attention inside each scale. Stateless."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        return attend_within_scales(q, k, v, lengths_of(shapes), self.softmax_scale), None


class WindowAttention(Attention):
    """Attention to the window x window square around each token, inside its scale. Stateless."""

    def __init__(self, width: int, heads: int, qk_norm: bool, window: int) -> None:
        super().__init__(width, heads, qk_norm)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        return attend_window(q, k, v, shapes, self.window, self.softmax_scale), None


class BlockCausalAttention(Attention):
    """Attention to the same and all coarser scales. The state is a KV cache of all scales so far, (b, h, l, p) each."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        return attend_block_causal(q, k, v, lengths_of(shapes), self.softmax_scale), (k, v)


class MarkovAttention(Attention):
    """Attention to the same and the previous scale. The state is a KV cache of the last scale, (b, h, n, p) each."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: tuple[Shape, ...], state: State) -> tuple[Tensor, State]:
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        lengths = lengths_of(shapes)
        last = slice(k.shape[2] - lengths[-1], None)
        return attend_previous(q, k, v, lengths, self.softmax_scale), (k[:, :, last], v[:, :, last])
