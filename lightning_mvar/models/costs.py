"""Parameter, FLOP and memory counts of a network, measured on the meta device, and networks of a given cost.

FLOPs cover matrix products, attention and the Mamba-1 scan, two per multiply-add. Norms, activations, the short
convolutions of Mamba and other elementwise operations are not counted. In training, token-by-token causal attention is
counted including the masked half, because kernels may compute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR, Block, MVARState
from lightning_mvar.models.parameters import lower_precision
from lightning_mvar.models.scoring import images_at_once
from lightning_mvar.ops.recompute import Recipes, recomputation, restore
from lightning_mvar.scales import ScaleSchedule

META = torch.device("meta")


class Costs(NamedTuple):
    """Costs of a network in float32.

    Args:
        parameters: number of parameters.
        flops_per_training_image: FLOPs of a forward and a backward pass; a backward pass counts as two forward passes.
        flops_per_sampled_image: FLOPs of all network steps with guidance by the network itself, without the decoder.
        state_bytes_per_image: state after the last sampling step, without guidance and without the AdaLN tables.
    """

    parameters: int
    flops_per_training_image: int
    flops_per_sampled_image: int
    state_bytes_per_image: int


@cache
def costs_of(config: MVARConfig) -> Costs:
    def costs(network: MVAR) -> tuple[int, ...]:
        flops, state = step_costs(network)
        return num_parameters(network), 3 * count_flops(lambda: teacher_forced_pass(network)), 2 * sum(flops), state

    return Costs(*extrapolate_blocks(config, costs))


def count_parameters(config: MVARConfig) -> int:
    return extrapolate_blocks(config, lambda network: (num_parameters(network),))[0]


@cache
def forward_flops(config: MVARConfig) -> int:
    """Counts FLOPs of a teacher-forced pass over one image."""
    return extrapolate_blocks(config, lambda network: (count_flops(lambda: teacher_forced_pass(network)),))[0]


@cache
def scale_flops(config: MVARConfig) -> tuple[int, ...]:
    """Counts FLOPs of each scale of one image, without guidance."""
    steps = iter(extrapolate_blocks(config, lambda network: step_costs(network)[0]))
    counts = config.schedule.lengths if config.prediction == "token" else (1,) * config.schedule.num_scales
    return tuple(sum(islice(steps, count)) for count in counts)


def state_bytes(config: MVARConfig, dtype: torch.dtype) -> int:
    """Counts bytes of the state per image after the last step, without guidance and without the AdaLN tables."""

    def last_state(network: MVAR) -> tuple[int]:
        states = sampling_states(lower_precision(network, dtype))
        return (extrapolate_steps([mixer_state_bytes(state) for state in states], config)[-1],)

    return extrapolate_blocks(config, last_state)[0]


def training_bytes(config: MVARConfig, batch_size: int, activation_checkpointing: bool = False, shards: int = 1) -> int:
    """Estimates the peak memory of a training step in bf16-mixed on a GPU, without the CUDA context and fragmentation.

    Counts weights, gradients and AdamW's moments in float32, autocast's copies of the weights, the operands that blocks
    keep for the backward pass, and the logits. Blocks are measured in PyTorch operations; with the GPU kernels, torch's
    allocator counts 2 % less (M-VAR) or 5 % more (VAR).

    Args:
        config: the network.
        batch_size: images per device and batch.
        activation_checkpointing: blocks keep only their inputs (`full`).
        shards: number of devices over which weights, gradients and moments are sharded; each gathers two blocks at a
            time.
    """
    parameters, length = count_parameters(config), config.schedule.num_tokens
    states = 16 * parameters // shards + 2 * parameters + (3 * 4 * parameters // config.depth if shards > 1 else 0)
    period = [kept_bytes(config, number) for number in range(min(config.mixer_period, config.depth))]
    blocks = [period[number % len(period)] for number in range(config.depth)]
    token_bytes = 4 * length * config.width  # an image's tokens between blocks, in float32
    if activation_checkpointing:
        kept = (config.depth + 1) * token_bytes + max(complete for _, complete in blocks)
    else:
        kept = token_bytes + sum(recomputed for recomputed, _ in blocks)
    images = min(batch_size, images_at_once(length, config.vocab_size))
    logits = 4 * 4 * images * length * config.vocab_size  # logits, their softmax and both gradients
    return states + batch_size * kept + logits


def kept_bytes(config: MVARConfig, number: int) -> tuple[int, int]:
    """Counts bytes per image that a block keeps for its backward pass, without and with its `cheap` operands.

    Both grow linearly with the number of tokens, so two short schedules suffice.
    """
    short, longer = (ScaleSchedule(side_lengths) for side_lengths in ((1, 2), (1, 2, 4)))
    added, apart = config.schedule.num_tokens - short.num_tokens, longer.num_tokens - short.num_tokens
    few, more = (block_operands(replace(config, schedule=schedule), number) for schedule in (short, longer))
    without, complete = (a + (b - a) * added // apart for a, b in zip(few, more, strict=True))
    return without, complete


def block_operands(config: MVARConfig, number: int) -> tuple[int, int]:
    """Measures `kept_bytes` on fake tensors, which have no values."""
    with FakeTensorMode():
        block = Block(config, number)
        tables = (1, 3 * (len(block.mixers) + 1)) if config.shared_adaln else ()

        def kept(batch_size: int, recompute: bool) -> int:
            x = torch.empty(batch_size, config.schedule.num_tokens, config.width, requires_grad=True)
            cond, operands = torch.empty(batch_size, *tables, config.width), Operands()
            saving = torch.autograd.graph.saved_tensors_hooks(operands.save, restore)
            precision = torch.autocast("cpu", dtype=torch.bfloat16)
            with precision, recomputation(operands if recompute else None), saving:
                block(x, cond, config.step_shapes)
            return sum(operands.sizes.values())

        return kept(2, True) - kept(1, True), kept(2, False) - kept(1, False)  # weights cancel in the difference


class Operands(Recipes):
    """Records the sizes of the storages that autograd keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.alive: list[torch.UntypedStorage] = []

    def save(self, operand: Any) -> Any:
        saved = super().save(operand)
        if isinstance(saved, Tensor):
            storage = saved.untyped_storage()
            self.sizes[storage._cdata] = storage.nbytes()
            self.alive.append(storage)  # so that no other storage gets its address
        return saved


def extrapolate_blocks(config: MVARConfig, measure: Callable[[MVAR], tuple[int, ...]]) -> tuple[int, ...]:
    """Measures a network of any depth on the meta device.

    Costs grow linearly with the number of periods of the mixer pattern, so deep networks are extrapolated from two
    shallow ones.
    """

    def measure_depth(depth: int) -> tuple[int, ...]:
        with META:
            network = MVAR(replace(config, depth=depth)).eval()
        return measure(network)

    period = config.mixer_period
    base = config.depth % period + period
    if config.depth <= base + period:
        return measure_depth(config.depth)
    periods = (config.depth - base) // period
    return tuple(a + periods * (b - a) for a, b in zip(measure_depth(base), measure_depth(base + period), strict=True))


def num_parameters(network: MVAR) -> int:
    return sum(p.numel() for p in network.parameters())


def teacher_forced_pass(network: MVAR) -> None:
    """Runs a teacher-forced pass over one image on the meta device."""
    config = network.config
    inputs = torch.empty(1, config.num_inputs, config.code_dim, device=META)
    network(torch.zeros(1, dtype=torch.int64, device=META), inputs)


def step_costs(network: MVAR) -> tuple[tuple[int, ...], int]:
    """Counts FLOPs of each sampling step of one image, and bytes of the mixers' state after the last step."""
    flops, sizes, states = list[int](), list[int](), sampling_states(network)
    while True:
        with FlopCounterMode(display=False) as counter:
            state = next(states, None)
        if state is None:
            return tuple(extrapolate_steps(flops, network.config)), extrapolate_steps(sizes, network.config)[-1]
        flops.append(counter.get_total_flops())
        sizes.append(mixer_state_bytes(state))


@torch.no_grad()
def sampling_states(network: MVAR) -> Iterator[MVARState]:
    """Yields the state after each step of one image; single tokens stop after three, see `extrapolate_steps`."""
    config = network.config
    state = network.init_state(torch.zeros(1, dtype=torch.int64, device=META))
    for k, n in enumerate(config.step_lengths[:3] if config.prediction == "token" else config.step_lengths):
        inputs = torch.empty(1, n, config.code_dim, device=META) if k else None
        _, state = network.step(inputs, state)
        yield state


def extrapolate_steps(costs: list[int], config: MVARConfig) -> list[int]:
    """Extends the costs of the first steps to all: each single-token step attends to one more token than the last."""
    increment = costs[-1] - costs[-2] if len(costs) > 1 else 0
    return costs + [costs[-1] + increment * (i + 1) for i in range(len(config.step_lengths) - len(costs))]


def mixer_state_bytes(state: MVARState) -> int:
    """Counts bytes of the mixers' state of one image, without the AdaLN tables."""
    tensors = (tensor for block in state.blocks if block for mixer in block.mixers for tensor in mixer or ())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_flops(run: Callable[[], object]) -> int:
    """Counts FLOPs of `run`; nothing is computed on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def match_budget(
    config: MVARConfig, by: Literal["width", "depth"], parameters: int | None = None, flops: int | None = None
) -> MVARConfig:
    """Returns the network whose cost is nearest to a budget, by changing its width or depth.

    Args:
        config: the network to change. The number of attention heads and the head dim of recurrences are kept.
        by: the field to change.
        parameters: budget as a number of parameters; or:
        flops: budget in FLOPs per training image.

    Raises:
        InputError: unless exactly one budget is given, or if the smallest network exceeds it.
    """
    if (parameters is None) == (flops is None) or by not in ("width", "depth"):
        raise InputError("a budget needs either `parameters` or `flops`, and `by` must be `width` or `depth`")
    target = float(parameters if parameters is not None else flops)  # type: ignore[arg-type]
    step = math.lcm(config.heads, config.head_dim // math.gcd(config.head_dim, config.expand)) if by == "width" else 1

    def cost(steps: int) -> int:
        network = replace(config, **{by: steps * step})  # type: ignore[arg-type]
        return count_parameters(network) if parameters is not None else 3 * forward_flops(network)

    if cost(1) > target:
        raise InputError(
            f"a budget of {target:.4g} is below the cost of the smallest network, {by} {step}: {cost(1):.4g}"
        )
    high = 1
    while cost(high) < target:
        high *= 2
    low = high // 2
    while high - low > 1:  # cost(low) < target <= cost(high)
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    nearest = min((steps for steps in (low, high) if steps), key=lambda steps: abs(cost(steps) - target))
    return replace(config, **{by: nearest * step})  # type: ignore[arg-type]
