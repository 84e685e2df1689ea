"""Mamba-2 between its projections in three kernels: convolution, scan, gated norm. The reference is `ops.mamba2`.

These are custom operators, so torch.compile keeps each as one node. Only the arguments are saved for backward, which
recomputes convolution and scan and writes all gradients of the projection into one tensor. Triton launches kernels on
the current device, hence `device_of`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mvar.ops.triton.conv import conv_silu, conv_silu_backward
from lightning_mvar.ops.triton.gated_norm import gated_norm, gated_norm_backward
from lightning_mvar.ops.triton.scan import ScanInputs, scan, scan_backward


def split_projection(t: Tensor, conv_weight: Tensor, A_log: Tensor, norm_weight: Tensor) -> tuple[Tensor, ...]:
    """Splits the projection or its gradient (b, l, ...) into z, xBC and dt."""
    return t.split([len(norm_weight), len(conv_weight), len(A_log)], dim=-1)


def scan_inputs(
    xBC: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, inner: int, state: Tensor | None
) -> ScanInputs:
    n = (xBC.shape[-1] - inner) // 2
    x, B, C = xBC.split([inner, n, n], dim=-1)
    return ScanInputs(x.unflatten(-1, (len(A_log), -1)), B, C, dt, dt_bias, A_log, D, state)


@torch.library.custom_op("lightning_mvar::mamba2", mutates_args=())
def mamba2_forward(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor | None,
    scan_state: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `ops.mamba2.mamba2`: y (b, l, inner), the convolution's state and the scan's state."""
    with torch.cuda.device_of(projected):
        z, xBC, dt = split_projection(projected.contiguous(), conv_weight, A_log, norm_weight)
        activated, new_conv_state = conv_silu(xBC, conv_weight, conv_bias, conv_state)
        y, final, _ = scan(scan_inputs(activated, dt, dt_bias, A_log, D, len(norm_weight), scan_state))
        return gated_norm(y.flatten(2), z, norm_weight, eps), new_conv_state, final


@torch.library.custom_op("lightning_mvar::mamba2_backward", mutates_args=())
def mamba2_backward(
    dout: Tensor,
    dnew_conv_state: Tensor | None,
    dfinal: Tensor | None,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor | None,
    scan_state: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients, those of parameters in float32.

    Returns:
        Gradients of the projection, of the convolution's weight and bias (c, w + 1), of dt_bias, A_log and D (3, h), of
        the norm's weight, and of the two states; the last two are empty without states.
    """
    with torch.cuda.device_of(projected):
        z, xBC, dt = split_projection(projected.contiguous(), conv_weight, A_log, norm_weight)
        activated, _ = conv_silu(xBC, conv_weight, conv_bias, conv_state)
        inputs = scan_inputs(activated, dt, dt_bias, A_log, D, len(norm_weight), scan_state)
        y, _, states = scan(inputs, keep_states=True)
        dprojected = projected.new_empty(projected.shape)
        dz, dxBC, ddt = split_projection(dprojected, conv_weight, A_log, norm_weight)
        dy, dnorm_weight = gated_norm_backward(dout, dz, y.flatten(2), z, norm_weight, eps)
        dactivated = torch.empty_like(activated)
        dx, dBC = dactivated.split([y.shape[2] * y.shape[3], 2 * inputs.B.shape[2]], dim=-1)
        assert states is not None
        heads_dBC, dheads, dscan_state = scan_backward(
            dy.view_as(y), dfinal, dx.unflatten(-1, y.shape[2:]), ddt, inputs, states
        )
        torch.sum(heads_dBC.flatten(3), 2, out=dBC)
        dconv, dconv_state = conv_silu_backward(
            dactivated, dnew_conv_state, dxBC, xBC, conv_weight, conv_bias, conv_state
        )
    empty = dconv.new_empty(0)
    return (
        dprojected,
        dconv,
        dheads.sum(0),
        dnorm_weight,
        empty if dconv_state is None else dconv_state,
        empty.clone() if dscan_state is None else dscan_state,
    )


@mamba2_forward.register_fake
def _(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, conv_state: Tensor | None, scan_state: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, l, _ = projected.shape
    (c, taps), inner, h = conv_weight.shape, len(norm_weight), len(A_log)
    final = projected.new_empty(b, h, inner // h, (c - inner) // 2, dtype=torch.float32)
    return projected.new_empty(b, l, inner), projected.new_empty(b, taps - 1, c), final


@mamba2_backward.register_fake
def _(
    dout: Tensor, dnew_conv_state: Tensor | None, dfinal: Tensor | None, projected: Tensor, conv_weight: Tensor,
    conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_weight: Tensor, conv_state: Tensor | None,
    scan_state: Tensor | None, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    (c, taps), inner, h = conv_weight.shape, len(norm_weight), len(A_log)
    sums = [conv_weight.new_empty(*shape, dtype=torch.float32) for shape in ((c, taps + 1), (3, h), (inner,))]
    states = [sums[0].new_empty(0) if state is None else torch.empty_like(state) for state in (conv_state, scan_state)]
    return torch.empty_like(projected), *sums, *states


def save_arguments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def backward(
    ctx: Any, dout: Tensor | None, dconv_state: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing raises at a second access
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv_state, scan_state = saved
    if dout is None:
        dout = projected.new_zeros(*projected.shape[:2], len(norm_weight))
    gradients = [None if t is None else t.contiguous() for t in (dout, dconv_state, dfinal)]
    dprojected, dconv, dheads, dnorm_weight, dconv_state, dscan_state = mamba2_backward(*gradients, *saved, ctx.eps)
    sums = (dconv[:, :-1], dconv[:, -1], *dheads, dnorm_weight)
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    return (
        dprojected,
        *(gradient.to(parameter.dtype) for gradient, parameter in zip(sums, parameters, strict=True)),
        None if conv_state is None else dconv_state,
        None if scan_state is None else dscan_state,
        None,
    )


mamba2_forward.register_autograd(backward, setup_context=save_arguments)
