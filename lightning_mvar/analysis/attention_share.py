"""Share of a VAR's attention that stays within a scale or goes to coarser scales.

This measurement motivates M-VAR (arXiv 2411.10433): attention mostly stays within a scale, so M-VAR keeps attention
within scales and replaces attention between scales with Mamba-2, which is cheaper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.models.attention import BlockCausalAttention
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR


@torch.no_grad()
def attention_share(network: MVAR, labels: Tensor, scale_inputs: Tensor) -> Tensor:
    """Measures how the attention of each scale is distributed over the scales in a teacher-forced pass.

    Args:
        network: network with block-causal attention, in eval mode.
        labels: (b,) int64 in [0, num_classes]; `num_classes` means unconditional.
        scale_inputs: (b, l - first, c), the output of `teacher_inputs` for the images' tokens.

    Returns:
        (depth, K, K) float32: per block, row i and column j, the attention weight that a query of scale i gives to all
        keys of scale j, averaged over images, heads and queries. Rows sum to 1; entries above the diagonal are 0.

    Raises:
        InputError: if the network has no block-causal attention.
    """
    mixers = [module for module in network.modules() if isinstance(module, BlockCausalAttention)]
    if not mixers:
        raise InputError(
            f"the network's mixers are {network.config.mixer_summary}: only block_causal_attention attends "
            f"across scales; train one with configs/mixer/var.yaml"
        )
    shares: list[Tensor] = []

    def measure(mixer: BlockCausalAttention, inputs: tuple[Tensor, ...]) -> None:
        shares.append(mixer_share(mixer, inputs[0], network.config))

    hooks = [mixer.register_forward_pre_hook(measure) for mixer in mixers]
    try:
        network(labels, scale_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(shares)


def mixer_share(mixer: BlockCausalAttention, x: Tensor, config: MVARConfig) -> Tensor:
    """Returns the shares (K, K) of one mixer for its input x (b, l, d) of all scales; see `attention_share`.

    Attends with the one-hot scale of each key as its value, so that the output is the weight per scale. The l x l
    weights of single keys are never materialized.
    """
    q, k, v = mixer.queries_keys_values(x)
    schedule = config.schedule
    scales = schedule.num_scales
    # Padded to the head dim: memory-efficient kernels need values as wide as queries.
    key_scales = F.one_hot(schedule.scale_ids.to(x.device), max(scales, v.shape[-1])).to(v.dtype)
    y, _ = mixer.attend(q, k, key_scales.expand(*v.shape[:2], -1, -1), config.step_shapes, None)
    weights = y[..., :scales].float().mean(dim=(0, 1))  # (l, K)
    return torch.stack([part.mean(dim=0) for part in weights.split(schedule.lengths)])
