"""Short causal convolution before the Mamba-2 scan (arXiv 2405.21060, section 7), without transposing the tokens.

Shapes: b batch, l tokens, c channels, w taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.ops.recompute import cheap

# Dtypes for which oneDNN has a native depthwise convolution. Without native bfloat16, torch is a hundred times slower.
ONEDNN_DTYPES_BY_CPU = {"AVX2": (torch.float32,), "AVX512": (torch.float32, torch.bfloat16)}
HAS_ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN_DTYPES = ONEDNN_DTYPES_BY_CPU.get(torch.backends.cpu.get_cpu_capability(), ()) if HAS_ONEDNN else ()


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolves each channel: y_t = bias + sum over j of weight_j x_{t + j}, where x starts w - 1 tokens earlier.

    Args:
        x: (b, w - 1 + l, c) the last w - 1 inputs of earlier calls (zeros at first), followed by the l new ones.
        weight: (c, w); the last tap applies to the current token.
        bias: (c,).

    Returns:
        (b, l, c) in the dtype of `x`.
    """
    return CausalConv.apply(x, weight.to(x.dtype), bias.to(x.dtype))


def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Convolves x (b, l, c), continuing after the inputs in `state`.

    Args:
        x, weight, bias: as in `causal_conv`, x without earlier inputs.
        state: (b, w - 1, c) as returned by the previous call; None before the first.

    Returns:
        (b, l, c) in the dtype of `x`, and the last w - 1 inputs (b, w - 1, c).
    """
    past = weight.shape[1] - 1
    x = cheap(F.pad, x, (0, 0, past, 0)) if state is None else torch.cat([state, x], dim=1)
    return cheap(causal_conv, x, weight, bias), x[:, x.shape[1] - past :]


class CausalConv(torch.autograd.Function):
    """Depthwise convolution with a custom backward pass; torch's own is slower in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return depthwise_conv(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        length, past = dy.shape[1], weight.shape[1] - 1
        dx = depthwise_conv(F.pad(dy, (0, 0, past, past)), weight.flip(1), torch.zeros_like(weight[:, 0]))
        products = [(dy * x[:, j : j + length]).sum((0, 1), dtype=torch.float32) for j in range(past + 1)]
        return dx, torch.stack(products, dim=1).to(weight.dtype), dy.sum((0, 1))


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolves without autograd; arguments and result as in `causal_conv`, all of one dtype."""
    if x.is_cpu and x.dtype in ONEDNN_DTYPES:
        images = x.transpose(1, 2)[:, :, None]  # (b, c, 1, w - 1 + l) in channels_last, the layout of the tokens
        return F.conv2d(images, weight[:, None, None], bias, groups=len(weight))[:, :, 0].transpose(1, 2)
    taps = weight.t().contiguous()  # (w, c): strided taps would prevent vectorization
    length = x.shape[1] - len(taps) + 1
    y = torch.addcmul(bias, x[:, :length], taps[0])
    for j, tap in enumerate(taps[1:], start=1):
        y.addcmul_(x[:, j : j + length], tap)
    return y
