import math
from itertools import pairwise

import lightning as L
import pytest
import torch
from conftest import tiny_network
from torch import nn

from lightning_mvar.errors import InputError
from lightning_mvar.models.parameters import UNDECAYED
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.optim import (
    OptimizerConfig,
    apply_schedule,
    build_optimizer,
    parameter_groups,
    skip_step_unless,
)
from lightning_mvar.training.run_state import check_optimizer

CONFIG = OptimizerConfig(base_lr=1e-4, final_lr_ratio=0.1, weight_decay=0.05, final_weight_decay=0.08)
TOTAL, BATCH = 1000, 768
PEAK = 3e-4


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.005 * PEAK),
        (10, (0.005 + 0.995 / 2) * PEAK),
        (20, PEAK),
        (60, PEAK),  # 4 % of the 979 steps after warm-up: still on the plateau
        (999, 0.1 * PEAK),
        (5000, 0.1 * PEAK),
        (20 + 979 // 2, (0.1 + 0.9 * (1 - (979 // 2) / 979) / 0.95) * PEAK),
    ],
)
def test_learning_rate_at_chosen_steps(step: int, expected: float) -> None:
    assert CONFIG.learning_rate(step, TOTAL, BATCH) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "total", "expected"),
    [
        (10, 1000, (0.005 + 0.995 / 2) * PEAK),
        (20, 1000, PEAK),
        (20 + 783, 1000, PEAK),  # 79.98 % of the 979 steps after warm-up
        (20 + 881, 1000, PEAK * (1 - 881 / 979) / 0.2),
        (999, 1000, 0.0),
        (783, 2000, PEAK),  # the plateau does not depend on the number of steps
    ],
)
def test_warm_up_stable_decay(step: int, total: int, expected: float) -> None:
    config = OptimizerConfig(base_lr=1e-4, plateau=0.8, final_lr_ratio=0.0)
    assert config.learning_rate(step, total, BATCH) == pytest.approx(expected, abs=1e-12)
    constant = OptimizerConfig(base_lr=1e-4, plateau=1.0)
    assert constant.learning_rate(max(step, 20), 1000, BATCH) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "batches", "expected"),
    [(50, -1, 9, 50), (-1, 4, 9, 20), (50, 4, 9, 20), (15, 4, 9, 15), (50, 4, math.inf, 50)],
)
def test_the_schedule_ends_with_the_run(max_steps: int, max_epochs: int, batches: float, expected: int) -> None:
    module = ScheduledModule(OptimizerConfig(), 1)
    module.trainer = L.Trainer(
        accelerator="cpu", logger=False, max_steps=max_steps, max_epochs=max_epochs, accumulate_grad_batches=2
    )
    module.trainer.fit_loop.max_batches = batches
    assert module.total_steps == expected


def test_the_learning_rate_falls_monotonically_after_warm_up() -> None:
    rates = [CONFIG.learning_rate(step, TOTAL, BATCH) for step in range(20, TOTAL)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates))


@pytest.mark.parametrize(("step", "progress"), [(0, 0.0), (250, 250 / 999), (999, 1.0)])
def test_weight_decay_is_a_cosine_to_its_final_value(step: int, progress: float) -> None:
    expected = 0.08 + (0.05 - 0.08) * (1 + math.cos(math.pi * progress)) / 2
    assert CONFIG.decay(step, TOTAL) == pytest.approx(expected)
    assert OptimizerConfig(weight_decay=0.05).decay(step, TOTAL) == pytest.approx(0.05)


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_parameters_with_and_without_weight_decay(shared_adaln: bool) -> None:
    network = tiny_network(shared_adaln=shared_adaln)
    decayed, undecayed = parameter_groups(network, UNDECAYED)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    undecayed_names = {names[id(parameter)] for parameter in undecayed["params"]}
    endings = ("bias", "start_embed", "pos_embed", "scale_embed.weight", "adaln_table", "qk_scale_log", "A_log", ".D")
    assert undecayed_names == {n for n in names.values() if n.endswith((*endings, "mixers.1.norm.weight"))}
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)
    assert any(n.endswith("class_embed.weight") for n in names.values() if n not in undecayed_names)


def test_decay_rates_of_recurrences_have_no_weight_decay() -> None:
    """Those of Mamba-1 and linear attention are 2-d, so they are excluded by name."""
    network = tiny_network(mixers=("mamba1", "linear_attention"))
    _, undecayed = parameter_groups(network, UNDECAYED)
    undecayed_ids = {id(parameter) for parameter in undecayed["params"]}
    rates = [p for name, p in network.named_parameters() if name.endswith(("A_log", "decay_log"))]
    assert [p.ndim for p in rates] == [2] * 4
    assert all(id(p) in undecayed_ids for p in rates)


def test_the_schedule_reaches_both_groups_and_spares_the_undecayed() -> None:
    optimizer = build_optimizer(tiny_network(), CONFIG)
    lr, weight_decay = apply_schedule(optimizer, CONFIG, 500, TOTAL, BATCH)
    assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [weight_decay, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_a_step_is_adamw() -> None:
    """The first step, from zero moments, is p (1 - lr decay) - lr sign(gradient)."""
    network = tiny_network()
    optimizer = build_optimizer(network, CONFIG)
    lr, weight_decay = apply_schedule(optimizer, CONFIG, 500, TOTAL, BATCH)
    weight = network.head.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - lr * weight_decay) - lr * weight.grad.sign())


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_lr": 0.0},
        {"warmup": 1.5},
        {"plateau": -0.1},
        {"final_lr_ratio": -0.1},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"weight_decay": -1.0},
        {"final_weight_decay": -1.0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        OptimizerConfig(**wrong)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_a_loaded_state_keeps_the_fused_flag_of_its_optimizer(before: bool, now: bool) -> None:
    """Float16 with loss scaling is not fused, other precisions are; a run may resume in another precision."""
    resumed, uninterrupted = nn.Linear(3, 2), nn.Linear(3, 2)
    uninterrupted.load_state_dict(resumed.state_dict())
    first, reference = build_optimizer(resumed, CONFIG, before), build_optimizer(uninterrupted, CONFIG, before)

    def step(model: nn.Linear, optimizer: torch.optim.Optimizer, gradient: float, finite: bool = True) -> None:
        model.weight.grad = torch.full_like(model.weight, gradient)
        skip_step_unless(torch.tensor(finite), optimizer)
        optimizer.step()

    step(resumed, first, 1.0)
    second = build_optimizer(resumed, CONFIG, now)
    second.load_state_dict(first.state_dict())
    assert [group["fused"] for group in second.param_groups] == [now, now]
    step(resumed, second, -2.0)
    for gradient in (1.0, -2.0):
        step(uninterrupted, reference, gradient)
    torch.testing.assert_close(resumed.weight, uninterrupted.weight)
    before_skip = resumed.weight.detach().clone()
    step(resumed, second, torch.nan, finite=False)
    assert torch.equal(resumed.weight, before_skip) == now  # otherwise loss scaling skips the step


def test_a_state_of_an_older_version_may_have_empty_groups() -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert [group["decays"] for group in optimizer.param_groups] == [True]
    model.weight.grad = torch.ones(2, 3)
    optimizer.step()
    state = optimizer.state_dict()
    empty = state["param_groups"][0] | {"params": [], "decays": False}
    older = state | {"param_groups": [*state["param_groups"], empty]}
    loaded = build_optimizer(model, OptimizerConfig())
    check_optimizer(older, loaded, "optimizer_states[0]")
    loaded.load_state_dict(older)
    assert len(loaded.param_groups) == 1
    assert torch.equal(loaded.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
