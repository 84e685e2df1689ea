"""QK-norm: queries and keys as unit vectors with a learned softmax scale per head (VAR, arXiv 2404.02905, section 3.2).

Shapes: b batch, l tokens, d width, h heads, p head dim; d = h p.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.ops.kernels import KERNELS
from lightning_mvar.ops.recompute import cheap

MAX_QK_SCALE = 100.0


def normalized_qkv(
    x: Tensor, weight: Tensor, q_bias: Tensor, v_bias: Tensor, scale_log: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects tokens to queries, keys and values; queries have length exp(scale_log), keys length 1.

    Args:
        x: (b, l, d).
        weight: (3 d, d) of the projection.
        q_bias, v_bias: (d,).
        scale_log: (h,) log of the softmax scale, at most log(MAX_QK_SCALE).

    Returns:
        q, k and v, each (b, h, l, p), in the dtype of the projection.
    """
    h = len(scale_log)
    kernel = KERNELS.get("qk norm") if x.is_cuda else None
    if kernel is not None:
        q, k, v = kernel(F.linear(x, weight), q_bias, v_bias, scale_log, math.log(MAX_QK_SCALE)).transpose(2, 3)
        return q, k, v
    q, k, v = project_qkv(x, weight, q_bias, v_bias, h)
    # In float32: a scale of up to 100 would amplify the rounding of unit vectors in half precision.
    scale = scale_log.float().clamp(max=math.log(MAX_QK_SCALE)).exp()[:, None, None]
    return (cheap(unit_vectors, q) * scale).to(v.dtype), cheap(unit_vectors, k).to(v.dtype), v


def unit_vectors(x: Tensor) -> Tensor:
    """Scales vectors x (..., p) to length 1, in float32."""
    return F.normalize(cheap(torch.Tensor.float, x), dim=-1)


def project_qkv(x: Tensor, weight: Tensor, q_bias: Tensor, v_bias: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projects tokens without normalization. Arguments and results as in `normalized_qkv`."""
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1)).transpose(1, 3).unbind(2)
    return q, k, v
