"""The residual pyramid against the published algorithm in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import OBLONG, SCHEDULE

from lightning_mvar import ScaleSchedule, Tokenizer
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer


def reference_encode(
    quantizer: ResidualQuantizer, features: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Returns the tokens and the next scale's inputs per scale, and the final f_hat (VAR, algorithm 1)."""
    shapes, codebook = quantizer.schedule.shapes, quantizer.codebook.weight
    last, count = shapes[-1], len(quantizer.phi)
    positions = [(2 * i + 1) / (2 * count) for i in range(count)]
    residual, f_hat, tokens, inputs = features.clone(), torch.zeros_like(features), [], []
    for k, shape in enumerate(shapes):
        small = F.adaptive_avg_pool2d(residual, shape)
        queries = small.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        nearest = torch.cdist(queries, codebook).argmin(dim=1)
        codes = codebook[nearest].view(len(features), *shape, -1).permute(0, 3, 1, 2)
        up = F.interpolate(codes, size=last, mode="bicubic") if shape != last else codes
        ratio = k / (len(shapes) - 1)
        phi = quantizer.phi[min(range(count), key=lambda i: abs(positions[i] - ratio))]
        h = 0.5 * up + 0.5 * F.conv2d(up, phi.weight, phi.bias, padding=1)
        f_hat, residual = f_hat + h, residual - h
        tokens.append(nearest.view(len(features), -1))
        if k + 1 < len(shapes):
            inputs.append(F.adaptive_avg_pool2d(f_hat, shapes[k + 1]).flatten(2).transpose(1, 2))
    return tokens, inputs, f_hat


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("schedule", [SCHEDULE, OBLONG])
@torch.no_grad()
def test_encode_decode_and_scale_inputs_follow_the_algorithm(schedule: ScaleSchedule) -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(schedule, 48, 8, 3)
    torch.nn.init.normal_(quantizer.codebook.weight)
    features = torch.randn(3, 8, *schedule.shapes[-1])
    tokens, inputs, f_hat = reference_encode(quantizer, features)
    ours = quantizer.encode(features)
    assert torch.equal(ours, torch.cat(tokens, dim=1))
    torch.testing.assert_close(quantizer.decode(ours), f_hat)
    torch.testing.assert_close(quantizer.scale_inputs(ours), torch.cat(inputs, dim=1))


def test_codes_of_a_single_scale_are_recovered_exactly(tokenizer: Tokenizer) -> None:
    """With phi as the identity, features that one scale can represent leave no residual."""
    quantizer = ResidualQuantizer(ScaleSchedule((1, 2, 4)), 32, 4, 2)
    for phi in quantizer.phi:
        torch.nn.init.dirac_(phi.weight)
        torch.nn.init.zeros_(phi.bias)
    torch.nn.init.normal_(quantizer.codebook.weight)
    with torch.no_grad():
        quantizer.codebook.weight[0] = 0.0
        exact = quantizer.codebook(torch.full((2, 1), 5)).transpose(1, 2)[..., None].expand(2, 4, 4, 4)
        tokens = quantizer.encode(exact)
        torch.testing.assert_close(quantizer.decode(tokens), exact, atol=1e-5, rtol=0)
    assert tokens[:, 0].tolist() == [5, 5]
    assert not tokens[:, 1:].any()


def test_gradients_reach_codebook_and_phi(tokenizer: Tokenizer, features: torch.Tensor) -> None:
    quantizer = ResidualQuantizer(tokenizer.config.schedule, 16, 8, 3)
    *_, step = quantizer.pyramid(features)
    step.f_hat.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in quantizer.parameters())


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [(256, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]), (1024, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3])],
)
def test_the_published_four_phi_are_shared_by_the_published_scales(resolution: int, expected: list[int]) -> None:
    """Nearest of 1/12, 13/36, 23/36, 11/12; at 256 px, rounding decides for scales 2 and 7, which lie half-way."""
    assert ResidualQuantizer(ScaleSchedule.for_resolution(resolution), 8, 4, 4).phi_of_scale == expected


def test_a_single_scale_has_no_scale_inputs() -> None:
    quantizer = ResidualQuantizer(ScaleSchedule((4,)), 16, 8, 1)
    assert quantizer.scale_inputs(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 0, 8)
