"""Compilation and activation checkpointing of a network's blocks, applied from outside."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_mvar.models.mvar import Block
from lightning_mvar.ops.recompute import recomputation

ActivationCheckpointing = Literal["none", "selective", "full"]
# Matrix products of linear layers (those of the scan are batched), scans, and prefixes of attention operators.
KEPT_OPERATORS = ("aten::mm", "aten::addmm", "lightning_mvar::mamba2", "lightning_mvar::selective_scan")
ATTENTION = ("aten::_scaled_dot_product", "torch_attn::")


def configure_block(block: Block, compile: bool, checkpointing: ActivationCheckpointing) -> None:
    """Compiles `block.forward`, makes the backward pass recompute it, or both.

    Args:
        block: the block. A deep copy uses its own weights.
        compile: whether to compile the complete forward pass and its recomputation with torch.compile. All blocks with
            the same mixers share one graph. A graph break is an error, because the rest would silently run eagerly.
        checkpointing: what the forward pass keeps for the backward pass: `full` only the block's input, `selective`
            also the outputs of linear layers, attention and scans, `none` everything.
    """
    forward: Any = Block.forward
    if checkpointing != "none":
        options = {} if checkpointing == "full" else {"context_fn": selective_contexts}
        forward = recomputed(forward, options)
    if compile:
        forward = torch.compile(forward, fullgraph=True)
    elif checkpointing != "none":
        forward = recomputation(None)(forward)  # recipes would keep tensors that are recomputed anyway
    block.forward = MethodType(forward, block)  # type: ignore[method-assign]


def recomputed(forward: Any, options: dict[str, Any]) -> Any:
    """Wraps a block's forward pass in activation checkpointing; it draws no random numbers that must be repeated."""

    def run(block: Block, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, block, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)

    return run


def keeps(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps the outputs that are expensive to compute relative to their size."""
    name = operator.name().split(".")[0]  # namespace::name[.overload]
    kept = name in KEPT_OPERATORS or name.startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


selective_contexts = partial(create_selective_checkpoint_contexts, keeps)
