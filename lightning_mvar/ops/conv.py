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
        ctx.save_for_backward(x, weight)
        taps, length = weight.shape[1], x.shape[1] - weight.shape[1] + 1
        y = torch.addcmul(bias, x[:, :length], weight[:, 0])
        for j in range(1, taps):
            y.addcmul_(x[:, j : j + length], weight[:, j])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        taps, length = weight.shape[1], dy.shape[1]
        dx, dweight = torch.zeros_like(x), torch.empty_like(weight)
        for j in range(taps):
            part = slice(j, j + length)
            dx[:, part].addcmul_(dy, weight[:, j])
            dweight[:, j] = (dy * x[:, part]).sum((0, 1), dtype=torch.float32)
        return dx, dweight, dy.sum((0, 1))
