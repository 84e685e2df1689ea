"""The short causal convolution in front of the scan of Mamba-2 (arXiv 2405.21060, section 7), on tokens as they lie.

Shapes: b batch, l tokens, c channels, w taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each channel by itself: y_t = bias + sum over j of weight_j x_{t + j}, for x that begins w - 1 tokens earlier.

    Args:
        x: (b, w - 1 + l, c) the inputs of earlier calls, zeros before the first, then those of the new tokens.
        weight: (c, w) the last tap is that of the token itself.
        bias: (c,).

    Returns:
        (b, l, c) in the dtype of `x`.
    """
    return CausalConv.apply(x, weight.to(x.dtype), bias.to(x.dtype))


class CausalConv(torch.autograd.Function):
    """A sum of shifted products: the general depthwise convolution wants channels first, and its backward is slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight.t().contiguous()  # (w, c): strided, they would keep the products from being vectorised
        ctx.save_for_backward(x, taps)
        length = x.shape[1] - len(taps) + 1
        y = torch.addcmul(bias, x[:, :length], taps[0])
        for j, tap in enumerate(taps[1:], start=1):
            y.addcmul_(x[:, j : j + length], tap)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        length = dy.shape[1]
        dx, dtaps = torch.zeros_like(x), torch.empty_like(taps)
        for j, tap in enumerate(taps):
            part = slice(j, j + length)
            dx[:, part].addcmul_(dy, tap)
            dtaps[j] = (dy * x[:, part]).sum((0, 1), dtype=torch.float32)
        return dx, dtaps.t(), dy.sum((0, 1))
