"""Tests of `attention_share` against a loop over queries and keys in float64."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import MIXERS, SCHEDULE, tiny_network
from torch import Tensor

from lightning_mvar.analysis.attention_share import attention_share
from lightning_mvar.errors import InputError
from lightning_mvar.models.attention import BlockCausalAttention
from lightning_mvar.models.mvar import MVAR


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 11, (batch,), generator=generator)
    return labels, torch.randn(batch, SCHEDULE.num_tokens - 1, 8, generator=generator)


@torch.no_grad()
def looped_share(network: MVAR, labels: Tensor, scale_inputs: Tensor) -> Tensor:
    """Returns shares (depth, K, K) in float64, computed query by query and weight by weight."""
    mixer_inputs: list[Tensor] = []
    mixers = [module for module in network.modules() if isinstance(module, BlockCausalAttention)]
    for mixer in mixers:
        mixer.register_forward_hook(lambda _, args, __: mixer_inputs.append(args[0].double()))
    network(labels, scale_inputs)
    share = torch.zeros(len(mixers), SCHEDULE.num_scales, SCHEDULE.num_scales, dtype=torch.float64)
    token_scales = SCHEDULE.scale_ids.tolist()
    for block, (mixer, x) in enumerate(zip(mixers, mixer_inputs, strict=True)):
        width = x.shape[-1]
        queries = x @ mixer.qkv.weight[:width].double().T + mixer.q_bias.double()
        keys = x @ mixer.qkv.weight[width : 2 * width].double().T
        for image, head in product(range(len(x)), range(mixer.heads)):
            channels = torch.arange(width).chunk(mixer.heads)[head]
            for query, scale in zip(queries[image, :, channels], token_scales, strict=True):
                visible = [
                    key
                    for key, key_scale in zip(keys[image, :, channels], token_scales, strict=True)
                    if key_scale <= scale
                ]
                if mixer.qk_scale_log is None:
                    logits = torch.stack(visible) @ query * 0.25 / math.sqrt(len(channels))
                else:
                    temperature = min(math.exp(mixer.qk_scale_log[head]), 100)
                    logits = F.cosine_similarity(torch.stack(visible), query, dim=1) * temperature
                for key_scale, weight in zip(
                    token_scales, logits.softmax(dim=0), strict=False
                ):  # visible keys come first
                    share[block, scale, key_scale] += weight / (len(x) * mixer.heads * SCHEDULE.lengths[scale])
    return share


@pytest.mark.parametrize("qk_norm", [True, False])
def test_shares_match_a_loop(qk_norm: bool) -> None:
    network = tiny_network(mixers=MIXERS["var"], qk_norm=qk_norm)
    share = attention_share(network, *inputs())
    torch.testing.assert_close(share.double(), looped_share(network, *inputs()), rtol=1e-4, atol=1e-5)


def test_rows_sum_to_one_and_finer_scales_get_nothing() -> None:
    share = attention_share(tiny_network(mixers=MIXERS["var"]), *inputs())
    assert share.shape == (2, SCHEDULE.num_scales, SCHEDULE.num_scales)
    torch.testing.assert_close(share.sum(dim=2), torch.ones(2, SCHEDULE.num_scales))
    assert share.triu(diagonal=1).abs().max() == 0


def test_more_scales_than_the_head_dim() -> None:
    network = tiny_network(mixers=MIXERS["var"], heads=32)
    share = attention_share(network, *inputs(1))
    torch.testing.assert_close(share.double(), looped_share(network, *inputs(1)), rtol=1e-4, atol=1e-5)


def test_the_network_is_unchanged() -> None:
    network = tiny_network(mixers=MIXERS["var"])
    with torch.no_grad():
        before = network(*inputs())
        attention_share(network, *inputs())
        assert torch.equal(network(*inputs()), before)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_network_without_block_causal_attention_is_rejected() -> None:
    with pytest.raises(InputError, match="scale_attention, mamba2: only block_causal_attention"):
        attention_share(tiny_network(), *inputs())
