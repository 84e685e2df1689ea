"""The short causal convolution in front of the scan of Mamba-2 (arXiv 2405.21060, section 7), on tokens as they lie.

Shapes: b batch, l tokens, c channels, w taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What oneDNN convolves channel by channel with an instruction of the processor. In bfloat16 without one, torch takes a
# hundred times as long.
FAST_ON_CPU = {"AVX2": (torch.float32,), "AVX512": (torch.float32, torch.bfloat16)}
FAST = FAST_ON_CPU.get(torch.backends.cpu.get_cpu_capability(), ()) if torch.backends.mkldnn.is_available() else ()


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
    """With a gradient of its own: torch's for depthwise convolutions takes longer in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolved(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        length, past = dy.shape[1], weight.shape[1] - 1
        dx = convolved(F.pad(dy, (0, 0, past, past)), weight.flip(1), torch.zeros_like(weight[:, 0]))
        products = [(dy * x[:, j : j + length]).sum((0, 1), dtype=torch.float32) for j in range(past + 1)]
        return dx, torch.stack(products, dim=1).to(weight.dtype), dy.sum((0, 1))


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Arguments, all of one dtype, and result as of `causal_conv`."""
    if x.is_cpu and x.dtype in FAST:
        images = x.transpose(1, 2)[:, :, None]  # (b, c, 1, w - 1 + l) in channels_last, in which tokens lie
        return F.conv2d(images, weight[:, None, None], bias, groups=len(weight))[:, :, 0].transpose(1, 2)
    taps = weight.t().contiguous()  # (w, c): strided, they would keep the products from being vectorised
    length = x.shape[1] - len(taps) + 1
    y = torch.addcmul(bias, x[:, :length], taps[0])
    for j, tap in enumerate(taps[1:], start=1):
        y.addcmul_(x[:, j : j + length], tap)
    return y
