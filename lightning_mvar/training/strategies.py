"""Sharding and gathering, applied to a network from outside.

`--trainer.strategy fsdp2` shards block by block (PyTorch's `fully_shard`); single-device training and `ddp` are
Lightning's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_mvar.checkpoints.sharded import ShardReader
from lightning_mvar.checkpoints.training import read_plain_part
from lightning_mvar.devices import exact_float32
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.tensors import is_finite, tensors_in
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.tokenizer.autoencoder import Level
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.freezing import freeze_parameters
from lightning_mvar.training.lightning_internals import DataParallelStrategy
from lightning_mvar.training.run_state import check_tensors

DEFAULT_TIMEOUT = timedelta(minutes=30)
PRECISIONS = ("32-true", "bf16-mixed")


class FSDP2Strategy(DataParallelStrategy):
    """Shards each block's weights, gradients and optimizer state over the ranks, and gathers a block when it runs.

    Args:
        param_dtype: dtype in which a block's weights are gathered; `bfloat16` halves the traffic and needs
            `--trainer.precision bf16-mixed`. Shards and gradient sums stay float32, but blocks see all their weights
            rounded, including those that autocast leaves in float32 (A_log, dt_bias, D, norms).
        data_parallel_replicate: number of replicas of the weights (hybrid sharding, HSDP); must divide the number of
            ranks. Each replica is sharded over consecutive ranks; with one replica per node, only gradients cross
            nodes.
        save_distributed_checkpoint: whether each rank writes its shard to a folder; otherwise rank 0 gathers a single
            file.
        process_group_backend: gloo on CPUs and nccl on GPUs if not given.
        timeout: how long a rank waits for the others before it gives up.
    """

    def __init__(
        self,
        param_dtype: Literal["float32", "bfloat16"] = "float32",
        data_parallel_replicate: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        require_in("[1, inf)", data_parallel_replicate=data_parallel_replicate)
        self.param_dtype, self.replicas = param_dtype, data_parallel_replicate

    @property
    def mesh(self) -> DeviceMesh:
        """Mesh over which weights are distributed: (shard,), or (replicate, shard) with several replicas."""
        return self.device_mesh if self.replicas > 1 else self.device_mesh["shard"]

    def setup_environment(self) -> None:
        precision = self.precision_plugin.precision
        if precision not in PRECISIONS:  # Lightning does not check a strategy given by name
            choices = ", ".join(PRECISIONS)
            raise InputError(f"FSDP2 does not support --trainer.precision {precision}; use one of {choices}")
        if self.param_dtype == "bfloat16" and precision != "bf16-mixed":
            raise InputError("FSDP2's param_dtype bfloat16 needs --trainer.precision bf16-mixed")
        # The warning is about the logits, a view that nothing changes in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint as Lightning does, but checks it first and runs no code from the files of a sharded one.

        Raises:
            InputError: if it is damaged or not finite, or lacks a part of the network.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        assert self.lightning_module is not None
        if not path.is_dir():
            check_tensors(read_plain_part(path), self.lightning_module, self.optimizers, f"--ckpt_path {path}")
            return super().load_checkpoint(path, weights_only=True)
        reader = ShardReader(path)
        state = {"state_dict": get_model_state_dict(self.model)}
        reader.load(state)
        self.require_finite(state, path)
        self.model.load_state_dict(state["state_dict"], strict=self.lightning_module.strict_loading)
        for index, optimizer in enumerate(self.optimizers):  # after the network: states are named by its parameters
            name = f"optimizer_{index}"
            part: dict[str, Any] = {name: get_optimizer_state_dict(self.model, optimizer)}
            trained = [group["params"] for group in part[name]["param_groups"]]
            reader.load(part)
            self.require_finite(part, path)
            if [group["params"] for group in part[name]["param_groups"]] != trained:
                raise InputError(
                    f"--ckpt_path {path} is from a run that trains other parameters: set model.freeze as before, or "
                    f"start a new run from it with --model.weights"
                )
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=part[name], options=options)
        return read_plain_part(path)

    def require_finite(self, state: dict[str, Any], path: Path) -> None:
        """Raises InputError on all ranks if any rank has a tensor in nested dictionaries that is not finite."""
        finite = all(is_finite(shard) for shard in local_shards(tensors_in(state)) if shard.is_floating_point())
        if not self.reduce_boolean_decision(finite):
            raise InputError(f"--ckpt_path {path} holds NaN or infinite values: use an earlier checkpoint")

    def shard_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Shards a tokenizer level by level, then the rest. Only `forward` gathers weights."""
        for part in tokenizer.modules():
            if isinstance(part, Level):
                self.shard(part)
        self.shard(tokenizer)

    def shard(self, module: nn.Module) -> None:
        """Shards a block, or the network after its blocks; sampling methods then gather weights as `forward` does.

        Embeddings and head stay in the network's own group, gathered from the first block to the end of the backward
        pass: 31 MiB for d16, 288 MiB for d36s as M-VAR, in addition to one block (109 and 367 MiB), and as much for
        gradients. Separate groups would save at most 1 % of the 57 GiB that d36s takes. But the loss calls the head
        once per part of a batch, and FSDP2 would reduce the gradients of its group in each call.
        """
        outermost = isinstance(module, MVAR | Tokenizer)
        dtype = torch.bfloat16 if self.param_dtype == "bfloat16" and not outermost else None
        # Inputs keep their dtype: the scan state must stay float32, and autocast casts the rest.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Codes change between forward and backward pass, so weights gathered for the forward pass would be outdated.
        reshard = True if isinstance(module, Tokenizer) else None
        fully_shard(module, mesh=self.mesh, reshard_after_forward=reshard, mp_policy=policy)
        if isinstance(module, MVAR):
            restore_resharding(module)
            register_fsdp_forward_method(module, "init_state")
            register_fsdp_forward_method(module, "step")
            register_fsdp_forward_method(module, "score")
            register_fsdp_forward_method(module, "redraw")


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="weights sharded block by block (PyTorch FSDP2)")


def shard_function(strategy: Strategy | None) -> Callable[[nn.Module], None]:
    """Returns the function that shards a part of a network; without FSDP2, it does nothing."""
    return strategy.shard if isinstance(strategy, FSDP2Strategy) else lambda part: None


def build_network(
    config: MVARConfig,
    device: torch.device,
    seed: int,
    finish: Callable[[nn.Module], None] = lambda part: None,
    load: Callable[[nn.Module, str], None] | None = None,
    freeze: Sequence[str] = (),
) -> MVAR:
    """Builds a network with its initial weights, which are the same with every strategy.

    The network is created on the meta device. `load`, then `finish`, which may shard, are called on each block before
    the next one is allocated, and finally on the network, so no rank ever holds a complete sharded network.

    Args:
        config: architecture.
        device: device of the weights.
        seed: seed of the initial weights.
        finish: called on each part, such as for sharding it.
        load: `load(part, prefix)` fills a part in place of initial weights; `prefix` precedes the names of its weights
            in the network. Outside the blocks, it may keep some initial weights.
        freeze: name patterns of the parameters that are not trained; see `freeze_parameters`.
    """
    with torch.device("meta"):
        network = MVAR(config)
    freeze_parameters(network, freeze)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for i, block in enumerate(network.blocks):
            block.to_empty(device=device)
            if load is None:
                block.init_weights()  # type: ignore[operator]
            else:
                load(block, f"blocks.{i}.")
            finish(block)
        for name, module in network.named_children():
            if name != "blocks":
                module.to_empty(device=device)
        network.to_empty(device=device, recurse=False)
        network.init_outer_weights()
        if load is not None:
            load(network, "")
        finish(network)
    return network


@contextmanager
def sampling_mode(network: MVAR, strategy: Strategy, keep_sharded: bool = False) -> Iterator[MVAR]:
    """Prepares the network being trained for `generate`: eval mode and the run's precision; all ranks must enter.

    Gathers a sharded network once instead of at each scale and block, and reshards it at the end.

    Args:
        network: the module's network, or the average of its weights.
        strategy: the trainer's strategy.
        keep_sharded: whether to gather one block at a time, at each scale, for networks that do not fit on a device.
    """
    training = network.training
    network.eval()
    try:
        # Compiled blocks would be recompiled for the length of each scale.
        eager, precision = torch.compiler.set_stance("force_eager"), strategy.precision_plugin.forward_context()
        with torch.no_grad(), eager, precision, exact_float32(), gathered(network, gather=not keep_sharded):
            yield network
    finally:
        network.train(training)


@contextmanager
def gathered(network: nn.Module, gather: bool) -> Iterator[None]:
    """Gathers all weights of an FSDP2 network on every rank if `gather`, and reshards it on exit; no-op for others."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded if gather else []:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        restore_resharding(network)
        for module in sharded:
            module.reshard()


def restore_resharding(network: nn.Module) -> None:
    """Makes each block free its gathered weights after the forward pass, except the last, where backward begins."""
    kept = [network, *(list(network.blocks)[-1:] if isinstance(network, MVAR) else [])]
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(module not in kept, recurse=False)


def unsharded_copy(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a copy with all weights in eval mode on the CPU; all ranks must call this."""
    weights = {name: full_tensor(tensor.detach()).cpu().clone() for name, tensor in tokenizer.state_dict().items()}
    with torch.device("meta"):
        copy = Tokenizer(tokenizer.config)
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


@torch.no_grad()
def assign_values(parameter: Tensor, values: Tensor) -> None:
    """Assigns new values to a parameter, sharded or not; every rank passes the complete values."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def local_shards(tensors: list[Any]) -> list[Tensor]:
    """Returns this rank's shard of each tensor; tensors that are not distributed are unchanged."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the full value of a replicated or sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
