from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mvar.training.base import update_ema, warm_up_decay


class Operations(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def pair(layers: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    average, weights = (nn.Sequential(*(nn.Linear(3, 5) for _ in range(layers))) for _ in range(2))
    return average.requires_grad_(False), weights


def values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_the_average_moves_by_its_share_and_is_left_alone_in_a_skipped_step() -> None:
    average, weights = pair(2)
    average[0].weight = nn.Parameter(torch.empty(0, 5), requires_grad=False)  # as a shard may be
    weights[0].weight = nn.Parameter(torch.empty(0, 5))
    before, target = values(average), values(weights)
    for step, decay in ((0, 0.1), (50, 51 / 60), (10**6, 0.999)):
        update_ema(average, weights, warm_up_decay(0.999, step), torch.tensor(True))
        before = [decay * a + (1 - decay) * w for a, w in zip(before, target, strict=True)]
        torch.testing.assert_close(values(average), before)
    assert all(torch.equal(a, b) for a, b in zip(values(weights), target, strict=True))
    before = values(average)
    next(weights[1].parameters()).data.fill_(torch.nan)
    update_ema(average, weights, 0.5, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(values(average), before, strict=True))


def test_an_update_takes_as_many_operations_for_many_parameters_as_for_few() -> None:
    counts = []
    for layers in (1, 40):
        with Operations() as operations:
            update_ema(*pair(layers), 0.9, torch.tensor(True))
        counts.append([name for name in operations.names if "fused" in name or "lerp" in name or "foreach" in name])
    assert counts[0] == counts[1] == ["aten._fused_sgd_.default"]
