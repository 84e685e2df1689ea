"""Blocks that are compiled or recomputed compute what plain blocks compute."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any, get_args

import pytest
import torch
from conftest import MIXERS, SCHEDULE, LiveMemory, random_tokens, relative_error, tiny_network
from torch import Tensor, nn

from lightning_mvar import MVAR
from lightning_mvar.models.mvar import Block
from lightning_mvar.ops.recompute import Recipes, recomputation
from lightning_mvar.training.blocks import ActivationCheckpointing, configure_block

CHECKPOINTING = get_args(ActivationCheckpointing)


class CountingBackend:
    """Runs captured graphs as they are, and counts them; code generation would take minutes."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CountingBackend:
    counting = CountingBackend()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    return counting


def make_network(compile: bool, checkpointing: ActivationCheckpointing, **overrides: object) -> MVAR:
    network = tiny_network(**({"drop_path": 0.5} | overrides))
    for block in network.blocks:
        assert isinstance(block, Block)
        configure_block(block, compile, checkpointing)
    return network


def losses_and_gradients(network: MVAR) -> list[Tensor]:
    """Runs a training pass and a validation pass."""
    torch.manual_seed(0)
    labels, tokens = torch.arange(4), random_tokens(4)
    inputs = torch.randn(4, SCHEDULE.num_tokens - 1, 8)
    losses, _ = network.train().score(labels, inputs, tokens)
    losses.mean().backward()
    with torch.no_grad():
        validation, _ = network.eval().score(labels, inputs, tokens)
    gradients = [parameter.grad for parameter in network.parameters()]
    return [losses, validation, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_recomputing_changes_no_bit_of_losses_and_gradients(mixer: str) -> None:
    runs = [losses_and_gradients(make_network(False, kind, mixers=MIXERS[mixer])) for kind in CHECKPOINTING]
    for run in runs[1:]:
        assert all(torch.equal(actual, expected) for actual, expected in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_cheap_operands_are_recomputed_under_any_checkpointing(checkpointing: ActivationCheckpointing) -> None:
    runs = []
    for recipes in (None, Recipes()):
        block = make_network(False, checkpointing).train().blocks[1]
        x = torch.randn(3, SCHEDULE.num_tokens, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with recomputation(recipes):
            y, _ = block(x, torch.ones(3, 64), SCHEDULE.shapes)
        y.square().sum().backward()
        runs.append([x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(actual, expected) for actual, expected in zip(*runs, strict=True))


@pytest.mark.parametrize(("checkpointing", "depth"), [("none", 12), ("selective", 2)])
def test_one_graph_serves_all_blocks_in_training_and_one_in_validation(
    checkpointing: ActivationCheckpointing, depth: int, backend: CountingBackend
) -> None:
    sizes = {"depth": depth, "mixers": ("scale_attention",)}
    compiled = losses_and_gradients(make_network(True, checkpointing, **sizes))
    assert backend.graphs == 2
    eager = losses_and_gradients(make_network(False, "none", **sizes))
    assert all(torch.equal(actual, expected) for actual, expected in zip(compiled, eager, strict=True))


def test_a_graph_break_is_an_error(backend: CountingBackend) -> None:
    class Breaks(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    network = make_network(True, "none", mixers=("scale_attention",))
    network.blocks[0].mlp[1] = Breaks()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        losses_and_gradients(network)


@pytest.mark.parametrize("compile", [False, True])
def test_a_deep_copy_runs_with_its_own_weights(compile: bool) -> None:
    block = make_network(compile, "full").blocks[0]
    copy = deepcopy(block)
    assert copy.forward.__func__ is block.forward.__func__
    assert copy.forward.__self__ is copy


def test_checkpointing_keeps_less_memory() -> None:
    kept = {}
    for kind, recipes in product(CHECKPOINTING, (None, Recipes())):
        block = make_network(False, kind, mixers=MIXERS["mvar"], drop_path=0.0).blocks[0]
        x = torch.randn(4, SCHEDULE.num_tokens, 64, requires_grad=True)
        with recomputation(recipes), LiveMemory() as memory:
            output = block(x, torch.randn(4, 64), SCHEDULE.shapes)[0]
            kept[kind, recipes is None] = memory.bytes() / (x.numel() * x.element_size())
        assert output.requires_grad
    for plain in (False, True):
        assert kept["full", plain] < kept["selective", plain] < 0.7 * kept["none", plain]
    for kind in ("selective", "full"):  # recipes keep nothing more
        assert kept[kind, False] == kept[kind, True]


@pytest.mark.cuda
@pytest.mark.parametrize("mixer", MIXERS)
def test_compiled_blocks_on_a_gpu_stay_near_eager_ones(mixer: str) -> None:
    """Compares losses and all gradients in bfloat16, of generated kernels with and without recomputation."""
    torch._dynamo.reset()
    results = []
    for compile, checkpointing in ((False, "none"), (True, "none"), (True, "selective")):
        network = make_network(compile, checkpointing, mixers=MIXERS[mixer], head_dim=16).cuda()
        torch.manual_seed(0)
        labels, tokens = torch.arange(4).cuda(), random_tokens(4).cuda()
        inputs = torch.randn(4, SCHEDULE.num_tokens - 1, 8).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            losses, _ = network.train().score(labels, inputs, tokens)
        losses.mean().backward()
        results.append([losses, *(p.grad for p in network.parameters() if p.grad is not None)])
    for compiled in results[1:]:
        for actual, expected in zip(compiled, results[0], strict=True):
            assert relative_error(actual, expected) < 5e-2
