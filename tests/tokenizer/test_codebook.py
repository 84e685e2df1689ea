"""EMA codes and entropy terms against their formulas in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mvar import ScaleSchedule
from lightning_mvar.errors import InputError
from lightning_mvar.tokenizer.codebook import (
    CodebookAverage,
    CodebookConfig,
    assignment_sums,
    entropy_loss,
)
from lightning_mvar.tokenizer.quantizer import PyramidStep, ResidualQuantizer, squared_distances


def make_quantizer(vocab_size: int = 12, code_dim: int = 4) -> ResidualQuantizer:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(ScaleSchedule((1, 2, 4)), vocab_size, code_dim, num_phi=2)
    torch.nn.init.normal_(quantizer.codebook.weight)
    return quantizer


def identity(tensor: Tensor) -> Tensor:
    """Averages over a single rank."""
    return tensor


def test_assignment_sums_equal_a_loop() -> None:
    quantizer = make_quantizer()
    steps = list(quantizer.pyramid(torch.randn(3, 4, 4, 4)))
    expected = torch.zeros(12, 5)
    for step in steps:
        for image in range(3):
            for query, token in zip(step.queries[image], step.tokens[image], strict=True):
                expected[token] += torch.cat([query, torch.ones(1)]).detach()
    torch.testing.assert_close(assignment_sums(steps, 12), expected)
    assert assignment_sums(steps, 12)[:, -1].sum() == 3 * 21


def test_codes_are_smoothed_running_means() -> None:
    torch.manual_seed(0)
    start, decay, smoothing = torch.randn(6, 3), 0.8, 1e-2
    average = CodebookAverage(start, CodebookConfig(learning="ema", decay=decay, smoothing=smoothing))
    sizes, sums = [1.0] * 6, start.clone()
    for _ in range(5):
        assigned = torch.cat([torch.randn(6, 3), torch.randint(4, (6, 1)).float()], dim=1)
        codes = average.update(assigned, torch.tensor(True))
        for i in range(6):
            sizes[i] = decay * sizes[i] + (1 - decay) * float(assigned[i, 3])
            sums[i] = decay * sums[i] + (1 - decay) * assigned[i, :3]
    total = sum(sizes)
    expected = [sums[i] / ((sizes[i] + smoothing) / (total + 6 * smoothing) * total) for i in range(6)]
    torch.testing.assert_close(codes, torch.stack(expected))


def test_a_skipped_step_changes_nothing_and_a_restarted_code_stays_in_place() -> None:
    start = torch.randn(4, 3)
    average = CodebookAverage(start, CodebookConfig(learning="ema"))
    nan_sums = torch.full((4, 4), torch.nan)
    torch.testing.assert_close(average.update(nan_sums, torch.tensor(False)), start)
    new_codes = torch.randn(4, 3) + 9
    average.restart(torch.tensor([False, False, True, False]), new_codes)
    for _ in range(3):
        codes = average.update(torch.zeros(4, 4), torch.tensor(True))
    torch.testing.assert_close(codes[2], new_codes[2], rtol=1e-3, atol=0)
    torch.testing.assert_close(codes[3], start[3], rtol=1e-3, atol=0)


def test_the_entropy_loss_equals_the_formula_and_reaches_encoder_and_codes() -> None:
    quantizer = make_quantizer()
    features = torch.randn(2, 4, 4, 4, requires_grad=True)
    codes = quantizer.codebook.weight
    steps = list(quantizer.pyramid(features))
    config = CodebookConfig(entropy_weight=1.0, temperature=0.3)
    loss = entropy_loss(quantizer, features, steps, codes, config, identity)
    terms = []
    for step in steps:
        queries = step.queries.flatten(0, 1)
        squared = torch.cdist(queries, codes) ** 2
        p = (-squared / (0.3 * squared.mean())).softmax(dim=1)
        mean = p.mean(dim=0)
        terms.append(-(p * p.log()).sum(dim=1).mean() + (mean * mean.log()).sum())
    assert float(loss) == pytest.approx(float(sum(terms)) / 3 / math.log(12), abs=1e-5)
    loss.backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
    assert codes.grad is not None
    assert codes.grad.abs().sum() > 0


@pytest.mark.parametrize(("chosen", "expected"), [(range(12), -1.0), ([0] * 12, 0.0)])
def test_extremes_of_the_entropy_loss(chosen: list[int], expected: float) -> None:
    """-1 if each query lies on a different code, 0 if all lie on the same one."""
    quantizer = ResidualQuantizer(ScaleSchedule((1,)), 12, 4, num_phi=1)
    codes = torch.eye(12)[:, :11] * 3
    features = codes[list(chosen)][:, :, None, None]
    steps = [PyramidStep(features.flatten(2).transpose(1, 2), torch.tensor(list(chosen))[:, None], features)]
    config = CodebookConfig(entropy_weight=1.0, temperature=0.01)
    assert float(entropy_loss(quantizer, features, steps, codes, config, identity)) == pytest.approx(expected, abs=1e-4)


def test_entropy_queries_limits_the_number_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, counts = make_quantizer(), []
    features = torch.randn(2, 4, 4, 4)
    config = CodebookConfig(entropy_weight=1.0, entropy_queries=5)
    module = "lightning_mvar.tokenizer.codebook.squared_distances"
    monkeypatch.setattr(module, lambda queries, codes: counts.append(len(queries)) or squared_distances(queries, codes))
    entropy_loss(quantizer, features, list(quantizer.pyramid(features)), quantizer.codebook.weight, config, identity)
    assert counts == [2, 5, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "codebook.decay"),
        ({"smoothing": 0.0}, "codebook.smoothing"),
        ({"temperature": 0.0}, "codebook.temperature"),
        ({"scale_dropout": 1.5}, "codebook.scale_dropout"),
        ({"entropy_weight": -0.1}, "codebook.entropy_weight"),
        ({"entropy_queries": 0}, "codebook.entropy_queries"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CodebookConfig(**options)  # type: ignore[arg-type]
