"""Biases of queries and values and QK-norm in one kernel; the reference is `ops.qk_norm`.

Shapes: b batch, l tokens, h heads, p head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 32


@torch.library.custom_op("lightning_mvar::qk_norm", mutates_args=())
def qk_norm(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, scale_log: Tensor, max_log: float) -> Tensor:
    """Computes `ops.qk_norm.normalized_qkv` after its projection: qkv (b, l, 3 h p) -> (3, b, l, h, p)."""
    b, l, _ = qkv.shape
    h = len(scale_log)
    p = qkv.shape[2] // (3 * h)
    out = qkv.new_empty(3, b, l, h, p)
    with torch.cuda.device_of(qkv):
        qk_norm_kernel[triton.cdiv(b * l, BLOCK_TOKENS), h](
            qkv.contiguous(), q_bias, v_bias, scale_log, out, b * l, max_log,
            P=p, BLOCK_T=BLOCK_TOKENS, BLOCK_P=triton.next_power_of_2(p),
        )  # fmt: skip
    return out


@torch.library.custom_op("lightning_mvar::qk_norm_backward", mutates_args=())
def qk_norm_backward(
    dout: Tensor, qkv: Tensor, q_bias: Tensor, scale_log: Tensor, max_log: float
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of qkv, and of the biases and the scale of each head (h, 2 p + 1) in float32."""
    _, b, l, h, p = dout.shape
    blocks = triton.cdiv(b * l, BLOCK_TOKENS)
    dqkv, partial = torch.empty_like(qkv), qkv.new_empty(blocks, h, 2 * p + 1, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        qk_norm_backward_kernel[blocks, h](
            dout.contiguous(), qkv.contiguous(), q_bias, scale_log, dqkv, partial, b * l, max_log,
            P=p, BLOCK_T=BLOCK_TOKENS, BLOCK_P=triton.next_power_of_2(p),
        )  # fmt: skip
    return dqkv, partial.sum(0)


@triton.jit
def head_scale(scale_log, head, max_log):
    return tl.exp(tl.minimum(tl.load(scale_log + head).to(tl.float32), max_log))


@triton.jit
def load_part(qkv, part, t, head, heads, c, inside, P: tl.constexpr):
    """Loads queries (part 0), keys (1) or values (2) of some tokens and one head."""
    return tl.load(qkv + (t[:, None] * 3 + part) * heads * P + head * P + c[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def qk_norm_kernel(
    qkv, q_bias, v_bias, scale_log, out, tokens, max_log, P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr
):
    head, heads = tl.program_id(1), tl.num_programs(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    c = tl.arange(0, BLOCK_P)
    inside = (t < tokens)[:, None] & (c < P)[None, :]
    part = tokens.to(tl.int64) * heads * P
    out += (t[:, None] * heads + head) * P + c[None, :]
    q = load_part(qkv, 0, t, head, heads, c, inside, P)
    q += tl.load(q_bias + head * P + c, mask=c < P, other=0.0).to(tl.float32)[None, :]
    k = load_part(qkv, 1, t, head, heads, c, inside, P)
    v = load_part(qkv, 2, t, head, heads, c, inside, P)
    v += tl.load(v_bias + head * P + c, mask=c < P, other=0.0).to(tl.float32)[None, :]
    q_factor = head_scale(scale_log, head, max_log) / tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-12)
    tl.store(out, q * q_factor[:, None], mask=inside)
    tl.store(out + part, k / tl.maximum(tl.sqrt(tl.sum(k * k, 1)), 1e-12)[:, None], mask=inside)
    tl.store(out + 2 * part, v, mask=inside)


@triton.jit
def unit_gradient(x, gradient):
    """Returns unit vectors of the rows of x, and the gradient of x given that of the unit vectors."""
    inverse = (1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12))[:, None]
    unit = x * inverse
    return unit, (gradient - unit * tl.sum(unit * gradient, 1)[:, None]) * inverse


@triton.jit
def qk_norm_backward_kernel(
    dout, qkv, q_bias, scale_log, dqkv, partial, tokens, max_log,
    P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(1), tl.num_programs(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    c = tl.arange(0, BLOCK_P)
    inside = (t < tokens)[:, None] & (c < P)[None, :]
    part = tokens.to(tl.int64) * heads * P
    dout += (t[:, None] * heads + head) * P + c[None, :]
    dqkv += t[:, None] * 3 * heads * P + head * P + c[None, :]
    scale = head_scale(scale_log, head, max_log)
    q = load_part(qkv, 0, t, head, heads, c, inside, P)
    q += tl.load(q_bias + head * P + c, mask=c < P, other=0.0).to(tl.float32)[None, :]
    gradient = tl.load(dout, mask=inside, other=0.0).to(tl.float32) * scale
    unit, dq = unit_gradient(q, gradient)
    dscale = tl.sum(tl.sum(unit * gradient, 1), 0)
    dscale = tl.where(tl.load(scale_log + head).to(tl.float32) <= max_log, dscale, 0.0)
    _, dk = unit_gradient(
        load_part(qkv, 1, t, head, heads, c, inside, P), tl.load(dout + part, mask=inside, other=0.0).to(tl.float32)
    )
    dv = tl.load(dout + 2 * part, mask=inside, other=0.0).to(tl.float32)
    tl.store(dqkv, dq, mask=inside)
    tl.store(dqkv + heads * P, dk, mask=inside)
    tl.store(dqkv + 2 * heads * P, dv, mask=inside)
    sums = partial + (tl.program_id(0) * heads + head) * (2 * P + 1)
    tl.store(sums + c, tl.sum(tl.where(inside, dq, 0.0), 0), mask=c < P)
    tl.store(sums + P + c, tl.sum(dv, 0), mask=c < P)
    tl.store(sums + 2 * P, dscale)


@qk_norm.register_fake
def _(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, scale_log: Tensor, max_log: float) -> Tensor:
    b, l, width = qkv.shape
    h = len(scale_log)
    return qkv.new_empty(3, b, l, h, width // (3 * h))


@qk_norm_backward.register_fake
def _(dout: Tensor, qkv: Tensor, q_bias: Tensor, scale_log: Tensor, max_log: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), qkv.new_empty(dout.shape[3], 2 * dout.shape[4] + 1, dtype=torch.float32)


def save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, q_bias, v_bias, scale_log, ctx.max_log = inputs
    ctx.v_bias_dtype = v_bias.dtype
    ctx.save_for_backward(qkv, q_bias, scale_log)


def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q_bias, scale_log = ctx.saved_tensors
    dqkv, sums = qk_norm_backward(dout, qkv, q_bias, scale_log, ctx.max_log)
    p = (sums.shape[1] - 1) // 2
    dq_bias, dv_bias, dscale = sums.split([p, p, 1], dim=1)
    return (
        dqkv,
        dq_bias.flatten().to(q_bias.dtype),
        dv_bias.flatten().to(ctx.v_bias_dtype),
        dscale.flatten().to(scale_log.dtype),
        None,
    )


qk_norm.register_autograd(backward, setup_context=save_arguments)
