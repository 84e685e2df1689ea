"""Mask-free attention against a single masked softmax over the full sequence."""

import inspect
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import lightning_mvar.ops.attention
from lightning_mvar import ScaleSchedule
from lightning_mvar.ops.attention import (
    attend_block_causal,
    attend_masked,
    attend_previous,
    attend_window,
    attend_within_scales,
    sequence_offsets,
)
from lightning_mvar.ops.kernels import look_for_kernels, with_scale

SCHEDULE = ScaleSchedule((1, 2, 3))
OBLONG = ScaleSchedule(((1, 2), (3, 4)))  # same number of tokens


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    return logits.softmax(dim=-1) @ v


@pytest.fixture
def qkv() -> Tensor:
    return torch.randn(3, 2, 4, SCHEDULE.num_tokens, 8, generator=torch.Generator().manual_seed(0))


def test_within_scales_is_a_block_diagonal_mask(qkv: Tensor) -> None:
    ids = SCHEDULE.scale_ids
    expected = masked_attention(*qkv, ids[:, None] == ids, 0.3)
    torch.testing.assert_close(attend_within_scales(*qkv, SCHEDULE.lengths, 0.3), expected)


def reference_varlen(q, k, v, offsets_q, offsets_k, longest_q, longest_k):  # type: ignore[no-untyped-def]
    """Implements the documented kernel on packed (tokens, heads, channels), one sequence at a time."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    assert (longest_q, longest_k) == (int(offsets_q.diff().max()), int(offsets_k.diff().max()))
    outputs = []
    for queries, keys in zip(pairwise(offsets_q.tolist()), pairwise(offsets_k.tolist()), strict=True):
        sequence = [t[slice(*part)].transpose(0, 1) for t, part in ((q, queries), (k, keys), (v, keys))]
        no_mask = torch.ones(queries[1] - queries[0], keys[1] - keys[0], dtype=torch.bool)
        outputs.append(masked_attention(*sequence, no_mask, q.shape[-1] ** -0.5).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("attend", [attend_within_scales, attend_block_causal, attend_previous])
def test_packed_attention_equals_a_call_per_scale(  # type: ignore[no-untyped-def]
    attend, qkv: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for kernels in ({}, {"packed attention": with_scale(reference_varlen)}):
        monkeypatch.setattr(lightning_mvar.ops.attention, "KERNELS", kernels)
        monkeypatch.setattr(lightning_mvar.ops.attention, "supports_packed_kernel", lambda q: True)
        leaf = qkv.clone().requires_grad_()
        y = attend(*leaf, SCHEDULE.lengths, 0.3)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


def test_the_variable_length_kernel_has_the_arguments_that_it_is_called_with() -> None:
    kernel = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    arguments = list(inspect.signature(kernel).parameters.values())
    assert [a.name for a in arguments[:7]] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert all(a.default is not inspect.Parameter.empty for a in arguments[7:])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_variable_length_kernel_matches_outputs_and_gradients(dtype: torch.dtype) -> None:
    look_for_kernels()
    q, k, v = torch.randn(3, 2, 4, SCHEDULE.num_tokens, 64, device="cuda", dtype=dtype)
    expected_inputs = [t.float().requires_grad_() for t in (q, k, v)]
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = attend_within_scales(*expected_inputs, SCHEDULE.lengths, 0.3)
    actual = attend_within_scales(*inputs, SCHEDULE.lengths, 0.3)
    weights = torch.randn_like(expected)
    tolerance = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(actual.float(), expected, **tolerance)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, e in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(a.grad.float(), e.grad, **tolerance)


def test_sequence_offsets_cached_in_inference_mode_support_autograd() -> None:
    with torch.inference_mode():
        offsets = sequence_offsets((1, 4, 9), 2, torch.device("cpu"))
    assert offsets.tolist() == [0, 1, 5, 14, 15, 19, 28]
    x = torch.ones(7, requires_grad=True)
    (x * offsets).sum().backward()


def test_block_causal_is_a_mask_over_scales(qkv: Tensor) -> None:
    ids = SCHEDULE.scale_ids
    expected = masked_attention(*qkv, ids[:, None] >= ids, 0.3)
    torch.testing.assert_close(attend_block_causal(*qkv, SCHEDULE.lengths, 0.3), expected)


@pytest.mark.parametrize(("attend", "reach"), [(attend_block_causal, 2), (attend_previous, 1)])
def test_gradients_of_attention_across_scales_equal_those_of_a_mask(attend, reach: int, qkv: Tensor) -> None:  # type: ignore[no-untyped-def]
    ids = SCHEDULE.scale_ids
    allowed = (ids[:, None] >= ids) & (ids[:, None] - ids <= reach)
    gradients = []
    for function, choice in ((masked_attention, allowed), (attend, SCHEDULE.lengths)):
        leaf = qkv.clone().requires_grad_()
        function(*leaf, choice, 0.3).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_block_causal_continues_after_cached_keys(qkv: Tensor) -> None:
    q, k, v = qkv
    full = attend_block_causal(q, k, v, SCHEDULE.lengths, 0.3)
    last = attend_block_causal(q[:, :, 5:], k, v, SCHEDULE.lengths[2:], 0.3)
    torch.testing.assert_close(last, full[:, :, 5:])


def test_token_by_token_is_a_causal_mask(qkv: Tensor) -> None:
    n = SCHEDULE.num_tokens
    expected = masked_attention(*qkv, torch.ones(n, n, dtype=torch.bool).tril(), 0.3)
    torch.testing.assert_close(attend_block_causal(*qkv, (1,) * n, 0.3), expected)


def test_previous_scale_attention_is_a_two_block_mask(qkv: Tensor) -> None:
    ids = SCHEDULE.scale_ids
    expected = masked_attention(*qkv, (ids[:, None] == ids) | (ids[:, None] == ids + 1), 0.3)
    torch.testing.assert_close(attend_previous(*qkv, SCHEDULE.lengths, 0.3), expected)


@pytest.mark.parametrize("schedule", [SCHEDULE, OBLONG])
@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("attend", [attend_window, attend_masked])
def test_window_attention_is_a_mask_of_neighbors_on_the_map(  # type: ignore[no-untyped-def]
    attend, qkv: Tensor, window: int, schedule: ScaleSchedule
) -> None:
    positions = [
        (k, row, column)
        for k, (height, width) in enumerate(schedule.shapes)
        for row in range(height)
        for column in range(width)
    ]
    reach = window // 2
    allowed = [
        [a[0] == b[0] and max(abs(a[1] - b[1]), abs(a[2] - b[2])) <= reach for b in positions] for a in positions
    ]
    expected = masked_attention(*qkv, torch.tensor(allowed), 0.3)
    torch.testing.assert_close(attend(*qkv, schedule.shapes, window, 0.3), expected)


def test_a_window_covering_the_map_equals_attention_within_scales(qkv: Tensor) -> None:
    torch.testing.assert_close(
        attend_window(*qkv, SCHEDULE.shapes, 5, 0.3), attend_within_scales(*qkv, SCHEDULE.lengths, 0.3)
    )
