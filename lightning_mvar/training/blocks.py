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
# Products of linear layers (the scan's are batched), scans, and kinds of attention by a part of their names.
KEPT_OPERATORS = ("aten::mm", "aten::addmm", "lightning_mvar::mamba2", "lightning_mvar::selective_scan")
ATTENTION = ("aten::_scaled_dot_product", "torch_attn::")


def configure_block(block: Block, compile: bool, checkpointing: ActivationCheckpointing) -> None:
    """Makes `block.forward` compiled, recomputed in the backward pass, or both.

    Args:
        block: the block. A deep copy of it uses its own weights.
        compile: compile the whole forward pass with torch.compile, together with what is recomputed. All blocks of the
            same mixers share one graph; a graph break is an error, because the rest would run eagerly unnoticed.
        checkpointing: what the forward pass keeps for the backward pass: `full` the block's input only, `selective`
            also the outputs of linear layers, attention and scans, `none` everything.
    """
    forward: Any = Block.forward
    if checkpointing != "none":
        options = {} if checkpointing == "full" else {"context_fn": selective_contexts}
        forward = recomputed(forward, options)
    if compile:
        forward = torch.compile(forward, fullgraph=True)
    elif checkpointing != "none":
        forward = recomputation(None)(forward)  # recipes would keep what is computed again anyway
    block.forward = MethodType(forward, block)  # type: ignore[method-assign]


def recomputed(forward: Any, options: dict[str, Any]) -> Any:
    """Wraps a block's forward pass; it draws no random numbers, so none need to be repeated."""

    def run(block: Block, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, block, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)

    return run


def keeps(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps what costs most to compute and little to store."""
    name = operator.name().split(".")[0]  # namespace::name[.overload]
    kept = name in KEPT_OPERATORS or name.startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


selective_contexts = partial(create_selective_checkpoint_contexts, keeps)
