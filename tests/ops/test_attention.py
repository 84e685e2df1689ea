"""Attention without masks against one masked softmax over the whole sequence."""

import pytest
import torch
from torch import Tensor

from lightning_mvar import ScaleSchedule
from lightning_mvar.ops.attention import attend_block_causal, attend_within_scales

SCHEDULE = ScaleSchedule((1, 2, 3))


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


def test_block_causal_is_a_mask_over_scales(qkv: Tensor) -> None:
    ids = SCHEDULE.scale_ids
    expected = masked_attention(*qkv, ids[:, None] >= ids, 0.3)
    torch.testing.assert_close(attend_block_causal(*qkv, SCHEDULE.lengths, 0.3), expected)


def test_block_causal_continues_after_cached_keys(qkv: Tensor) -> None:
    q, k, v = qkv
    whole = attend_block_causal(q, k, v, SCHEDULE.lengths, 0.3)
    last = attend_block_causal(q[:, :, 5:], k, v, SCHEDULE.lengths[2:], 0.3)
    torch.testing.assert_close(last, whole[:, :, 5:])
