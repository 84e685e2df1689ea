"""How a network is spread over devices. The network itself knows nothing of it.

`--trainer.strategy fsdp2` shards block by block (PyTorch's `fully_shard`); single device and `ddp` are Lightning's
own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.tokenizer.autoencoder import Level
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.lightning_internals import DataParallelStrategy

DEFAULT_TIMEOUT = timedelta(minutes=30)
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")


class FSDP2Strategy(DataParallelStrategy):
    """Every rank keeps a share of each block's weights, gradients and optimizer state, and gathers a block to use it.

    Args:
        param_dtype: what the blocks' weights are gathered in; `bfloat16` halves the traffic and goes with
            `--trainer.precision bf16-mixed`. The shares themselves, and the sums of gradients, stay float32; but blocks
            see all their weights rounded, also those that autocast leaves alone (A_log, dt_bias, D, norms).
        save_distributed_checkpoint: each rank writes its share to a folder; else rank 0 gathers one file.
        process_group_backend: where not given, gloo on CPUs and nccl on GPUs.
        timeout: how long a rank waits for the others before it gives up.
    """

    def __init__(
        self,
        param_dtype: Literal["float32", "bfloat16"] = "float32",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.param_dtype = param_dtype

    def setup_environment(self) -> None:
        precision = self.precision_plugin.precision
        if precision not in PRECISIONS:  # Lightning looks only where the strategy is not given by its name
            raise InputError(f"FSDP2 cannot work in --trainer.precision {precision}; it can in {', '.join(PRECISIONS)}")
        if self.param_dtype == "bfloat16" and precision != "bf16-mixed":
            raise InputError("FSDP2's param_dtype bfloat16 needs --trainer.precision bf16-mixed")
        # Logits are a view, which nobody changes in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        super().setup_environment()

    def shard_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Level by level, then the rest. Only its `forward` gathers weights."""
        for part in tokenizer.modules():
            if isinstance(part, Level):
                self.shard(part)
        self.shard(tokenizer)

    def shard(self, module: nn.Module) -> None:
        """Shard a block, or the network after its blocks: its methods for sampling gather weights as `forward` does."""
        outermost = isinstance(module, MVAR | Tokenizer)
        dtype = torch.bfloat16 if self.param_dtype == "bfloat16" and not outermost else None
        # Inputs keep their dtype: the scan's state is carried in float32, and autocast casts what may be cast.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Codes are changed between forward and backward pass: what was gathered would not know.
        reshard = True if isinstance(module, Tokenizer) else None
        fully_shard(module, mesh=self.device_mesh["data_parallel"], reshard_after_forward=reshard, mp_policy=policy)
        if isinstance(module, MVAR):
            register_fsdp_forward_method(module, "init_state")
            register_fsdp_forward_method(module, "step")


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="weights sharded block by block (PyTorch FSDP2)")


def build(
    config: MVARConfig, device: torch.device, seed: int, finish: Callable[[nn.Module], None] = lambda part: None
) -> MVAR:
    """A network with its initial weights, the same under every strategy.

    It is made on the meta device. `finish`, which may shard, is called on each block before the next one gets memory,
    and on the network last: no rank ever holds all of a sharded network.
    """
    with torch.device("meta"):
        network = MVAR(config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for block in network.blocks:
            block.to_empty(device=device).init_weights()  # type: ignore[operator]
            finish(block)
        for name, module in network.named_children():
            if name != "blocks":
                module.to_empty(device=device)
        network.to_empty(device=device, recurse=False)
        network.init_outer_weights()
        finish(network)
    return network


def recompute_in_backward(block: nn.Module) -> None:
    """Keep only a block's input for the backward pass, and run the block again there."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def sampling_from(network: MVAR, strategy: Strategy, keep_sharded: bool = False) -> Iterator[MVAR]:
    """The network in eval mode to call `generate` with, inside the block, on all ranks alike and in their precision.

    A sharded network is gathered once, not once per scale and block, and sharded again at the end.

    Args:
        network: of the module that is being trained.
        strategy: the trainer's.
        keep_sharded: gather block after block instead, scale after scale, where the whole does not fit on a device.
    """
    training = network.training
    network.eval()
    try:
        # Scales of ten lengths would make compiled blocks compile as often.
        eager, precision = torch.compiler.set_stance("force_eager"), strategy.precision_plugin.forward_context()
        with torch.no_grad(), eager, precision, gathered(network, whole=not keep_sharded):
            yield network
    finally:
        network.train(training)


@contextmanager
def gathered(network: nn.Module, whole: bool) -> Iterator[None]:
    """Inside, an FSDP2 network is `whole` on every rank; at the end it is sharded. Other networks stay as they are."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded if whole else []:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not network, recurse=False)
            module.reshard()


def whole_copy(tokenizer: Tokenizer) -> Tokenizer:
    """In eval mode on the CPU, a sharded one put together; all ranks must call this."""
    weights = {name: plain(tensor.detach()).cpu().clone() for name, tensor in tokenizer.state_dict().items()}
    with torch.device("meta"):
        copy = Tokenizer(tokenizer.config)
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


@torch.no_grad()
def overwrite(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter, of which each rank may have a share, new values, which all ranks have whole."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def local(tensors: list[Any]) -> list[Tensor]:
    """This rank's shares."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def plain(tensor: Tensor) -> Tensor:
    """The value that a replicated or sharded tensor has as a whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
