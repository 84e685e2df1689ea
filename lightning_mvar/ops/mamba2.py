"""Mamba-2 between its two projections (arXiv 2405.21060, section 7): convolution, SiLU, scan, skip term, gated norm.

`mamba2` runs the Triton kernels of this package on CUDA if Triton is installed, and `mamba2_reference`, in PyTorch
operations, otherwise.

Shapes: b batch, l tokens, h heads, p head dim, n SSM state, w taps; inner = h p;
c = inner + 2 n, the channels of x, B and C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.ops.conv import convolve
from lightning_mvar.ops.gated_norm import gated_rms_norm
from lightning_mvar.ops.kernels import KERNELS
from lightning_mvar.ops.recompute import cheap
from lightning_mvar.ops.ssd import ssd

State = tuple[Tensor, ...]  # last inputs of the convolution (b, w - 1, c); SSM state (b, h, p, n) float32


class Mamba2Parameters(NamedTuple):
    """Parameters between the projections, named as in `mamba_ssm.Mamba2`."""

    conv_weight: Tensor  # (c, w)
    conv_bias: Tensor  # (c,)
    dt_bias: Tensor  # (h,)
    A_log: Tensor  # (h,)
    D: Tensor  # (h,)
    norm_weight: Tensor  # (inner,)


def mamba2(projected: Tensor, parameters: Mamba2Parameters, state: State | None, eps: float) -> tuple[Tensor, State]:
    """Mixes projected tokens with the fastest implementation available for their device.

    Args:
        projected: (b, l, inner + c + h) output of the input projection: z, xBC and dt side by side.
        parameters: weights; any floating dtype.
        state: as returned by the previous call; None before the first.
        eps: added to the mean square of the norm.

    Returns:
        (b, l, inner) in the dtype of `projected`, and the next state.
    """
    kernel = KERNELS.get("mamba2") if projected.is_cuda else None
    if kernel is None:
        return mamba2_reference(projected, parameters, state, eps)
    y, *new_state = kernel(projected, *parameters, *(state or (None, None)), eps)
    return y, tuple(new_state)


def mamba2_reference(
    projected: Tensor, parameters: Mamba2Parameters, state: State | None, eps: float
) -> tuple[Tensor, State]:
    """Mixes projected tokens with PyTorch operations; same arguments and results as `mamba2`."""
    weights = parameters
    inner, heads = len(weights.norm_weight), len(weights.A_log)
    conv_state, scan_state = state if state is not None else (None, None)
    z, xBC, dt = projected.split([inner, len(weights.conv_bias), heads], dim=-1)
    xBC, conv_state = convolve(xBC, weights.conv_weight, weights.conv_bias, conv_state)
    n = (xBC.shape[-1] - inner) // 2
    x, B, C = F.silu(xBC).split([inner, n, n], dim=-1)
    x = x.unflatten(-1, (heads, -1))  # (b, l, h, p)
    # Step sizes and decays in float32: errors in their products accumulate over the sequence.
    dt = F.softplus(dt.float() + weights.dt_bias.float())
    y, scan_state = ssd(x, dt, -weights.A_log.float().exp(), B, C, scan_state)
    y = torch.addcmul(y, x, weights.D[:, None].to(x.dtype))
    return cheap(gated_rms_norm, y.flatten(2), z, weights.norm_weight, eps), (conv_state, scan_state)
