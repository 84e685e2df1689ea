"""What a network costs, counted without computing anything, and networks of a given cost.

Operations are those of matrix products, attention and the scan of Mamba-1, two for a multiplication and an addition;
norms, activations, the short convolutions of Mamba and other elementwise work are not counted. Attention that is causal
token by token counts in training with what its mask hides, as kernels may compute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR, MVARState

META = torch.device("meta")


class Costs(NamedTuple):
    """Of a network in float32.

    Args:
        parameters: learned numbers.
        flops_per_training_image: operations of a forward and a backward pass, of which a backward pass is two forwards.
        flops_per_sampled_image: operations of all steps of the network with guidance, the decoder not included.
        state_bytes_per_image: carried through the whole sampling, without guidance, but for the AdaLN tables.
    """

    parameters: int
    flops_per_training_image: int
    flops_per_sampled_image: int
    state_bytes_per_image: int


def costs_of(config: MVARConfig) -> Costs:
    def costs(network: MVAR) -> Costs:
        return Costs(num_parameters(network), 3 * count_flops(lambda: teach(network)), *sampling_costs(network))

    return Costs(*of_all_blocks(config, costs))


def parameters_of(config: MVARConfig) -> int:
    return of_all_blocks(config, lambda network: (num_parameters(network),))[0]


def forward_flops(config: MVARConfig) -> int:
    """Counted operations of a teacher-forced pass over one image."""
    return of_all_blocks(config, lambda network: (count_flops(lambda: teach(network)),))[0]


def sampling_flops(config: MVARConfig) -> int:
    """Counted operations of the guided steps of one image."""
    return of_all_blocks(config, sampling_costs)[0]


def state_bytes(config: MVARConfig, dtype: torch.dtype) -> int:
    """What an image carries through its whole sampling, without guidance, but for the AdaLN tables: bytes."""

    def at_the_end(network: MVAR) -> tuple[int]:
        steps = guided_steps(network.lower(dtype))
        return (of_all_steps([carried_bytes(state) for state in steps], config)[-1],)

    return of_all_blocks(config, at_the_end)[0]


def of_all_blocks(config: MVARConfig, measure: Callable[[MVAR], tuple[int, ...]]) -> tuple[int, ...]:
    """What `measure` gives for a network on the meta device.

    It grows by the same amounts with every turn of blocks, which are alike or take turns: two small networks tell those
    of any depth.
    """

    def at(depth: int) -> tuple[int, ...]:
        with META:
            network = MVAR(replace(config, depth=depth)).eval()
        return measure(network)

    least = config.depth % config.turn + config.turn
    if config.depth <= least + config.turn:
        return at(config.depth)
    turns = (config.depth - least) // config.turn
    return tuple(a + turns * (b - a) for a, b in zip(at(least), at(least + config.turn), strict=True))


def num_parameters(network: MVAR) -> int:
    return sum(p.numel() for p in network.parameters())


def teach(network: MVAR) -> None:
    """A teacher-forced pass over one image on the meta device."""
    config = network.config
    inputs = torch.empty(1, config.num_inputs, config.code_dim, device=META)
    network(torch.zeros(1, dtype=torch.int64, device=META), inputs)


def sampling_costs(network: MVAR) -> tuple[int, int]:
    """Operations of all steps of one guided image, two to the network, and the bytes it carries at the end."""
    flops, carried = [], []
    steps = guided_steps(network)
    while True:
        with FlopCounterMode(display=False) as counter:
            state = next(steps, None)
        if state is None:
            break
        flops.append(counter.get_total_flops())
        carried.append(carried_bytes(state))
    return sum(of_all_steps(flops, network.config)), of_all_steps(carried, network.config)[-1]


@torch.no_grad()
def guided_steps(network: MVAR) -> Iterator[MVARState]:
    """The state after each step of one guided image; of single tokens after three, see `of_all_steps`."""
    config = network.config
    state = network.init_state(torch.zeros(2, dtype=torch.int64, device=META))
    for k, n in enumerate(config.step_lengths[:3] if config.prediction == "token" else config.step_lengths):
        inputs = torch.empty(2, n, config.code_dim, device=META) if k else None
        _, state = network.step(inputs, state)
        yield state


def of_all_steps(costs: list[int], config: MVARConfig) -> list[int]:
    """Steps of one token are alike, but for what they attend to, one token more each time: three tell of all."""
    more = costs[-1] - costs[-2] if len(costs) > 1 else 0
    return costs + [costs[-1] + more * (i + 1) for i in range(len(config.step_lengths) - len(costs))]


def carried_bytes(state: MVARState) -> int:
    """Of one of two images, but for the AdaLN tables."""
    tensors = (tensor for block in state.blocks if block for mixer in block.mixers for tensor in mixer or ())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // 2


def count_flops(run: Callable[[], object]) -> int:
    """Counted operations of `run`; on the meta device it costs nothing."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def matched(
    config: MVARConfig, by: Literal["width", "depth"], parameters: int | None = None, flops: int | None = None
) -> MVARConfig:
    """The network of another width or depth whose cost comes nearest to a budget.

    Args:
        config: the network to change. Heads stay as many, heads of recurrences as wide.
        by: what to change.
        parameters: the budget in learned numbers, or:
        flops: the budget in operations per training image.

    Raises:
        InputError: unless one budget is given, or if already the smallest network passes it.
    """
    if (parameters is None) == (flops is None) or by not in ("width", "depth"):
        raise InputError("a budget is of `parameters` or `flops`, and met by `width` or `depth`")
    target = float(parameters if parameters is not None else flops)  # type: ignore[arg-type]
    step = math.lcm(config.heads, config.head_dim // math.gcd(config.head_dim, config.expand)) if by == "width" else 1

    def cost(steps: int) -> int:
        network = replace(config, **{by: steps * step})  # type: ignore[arg-type]
        return parameters_of(network) if parameters is not None else 3 * forward_flops(network)

    if cost(1) > target:
        raise InputError(f"a budget of {target:.4g} is below that of {by} {step}, the smallest: {cost(1):.4g}")
    high = 1
    while cost(high) < target:
        high *= 2
    low = high // 2
    while high - low > 1:  # cost(low) < target <= cost(high)
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    nearest = min((steps for steps in (low, high) if steps), key=lambda steps: abs(cost(steps) - target))
    return replace(config, **{by: nearest * step})  # type: ignore[arg-type]
