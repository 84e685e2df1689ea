"""Where the attention of a VAR looks: how much at the own scale, how much at coarser ones.

M-VAR (arXiv 2411.10433) starts from this measurement: attention mostly stays inside a scale, so that inside it
attention is kept, and between scales something cheaper takes its place.
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
    """Of the attention of each scale, the share that falls on each scale, in a teacher-forced pass.

    Args:
        network: one with block-causal attention, in eval mode.
        labels: (b,) int64 in [0, num_classes]; `num_classes` is unconditional.
        scale_inputs: (b, l - first, c) what `teacher_inputs` gives for the images' tokens.

    Returns:
        (depth, K, K) float32: for each block, in row i and column j, the weight that queries of scale i give to all
        keys of scale j together, mean over images, heads and queries. Rows sum to 1; above the diagonal is 0.

    Raises:
        InputError: if the network has no block-causal attention.
    """
    mixers = [module for module in network.modules() if isinstance(module, BlockCausalAttention)]
    if not mixers:
        raise InputError(
            f"the network's mixers are {network.config.mixing}: only block_causal_attention looks at more "
            f"than one scale, as with configs/mixer/var.yaml"
        )
    shares: list[Tensor] = []

    def measure(mixer: BlockCausalAttention, inputs: tuple[Tensor, ...]) -> None:
        shares.append(share_of(mixer, inputs[0], network.config))

    hooks = [mixer.register_forward_pre_hook(measure) for mixer in mixers]
    try:
        network(labels, scale_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(shares)


def share_of(mixer: BlockCausalAttention, x: Tensor, config: MVARConfig) -> Tensor:
    """Tokens x (b, l, d) of all scales, as the mixer is given them -> (K, K); see `attention_share`.

    The values that are averaged say which scale a key is of, so the averages are the weights of the scales; the weights
    of single keys, l x l for every head, never exist.
    """
    q, k, v = mixer.queries_keys_values(x)
    schedule = config.schedule
    scales = schedule.num_scales
    # At least as wide as a head: kernels that need no l x l memory want values like queries.
    scale_of_key = F.one_hot(schedule.scale_ids.to(x.device), max(scales, v.shape[-1])).to(v.dtype)
    y, _ = mixer.attend(q, k, scale_of_key.expand(*v.shape[:2], -1, -1), config.step_shapes, None)
    weights = y[..., :scales].float().mean(dim=(0, 1))  # (l, K)
    return torch.stack([part.mean(dim=0) for part in weights.split(schedule.lengths)])
