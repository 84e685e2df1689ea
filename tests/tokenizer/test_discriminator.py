"""The discriminator, its loss, and the adaptive weight against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mvar.errors import InputError
from lightning_mvar.tokenizer.discriminator import (
    AdversaryConfig,
    PatchDiscriminator,
    adaptive_weight,
    attach_gradient,
    hinge_loss,
    last_layer_gradient,
)


def test_the_discriminator_has_the_published_shape() -> None:
    """pix2pix: 30 x 30 scores per 256 x 256 image; convolutions of 64, 128, 256, 512 and 1 channels."""
    discriminator = PatchDiscriminator(AdversaryConfig(weight=1.0), (256, 256))
    with torch.no_grad():
        assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    convolutions = [module for module in discriminator if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [64, 128, 256, 512, 1]
    assert [conv.stride for conv in convolutions] == [(2, 2), (2, 2), (2, 2), (1, 1), (1, 1)]


def test_a_score_depends_only_on_its_own_image() -> None:
    torch.manual_seed(0)
    discriminator, images = (
        PatchDiscriminator(AdversaryConfig(channels=8, levels=2), (16, 16)),
        torch.rand(4, 3, 16, 16),
    )
    individual_scores = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), individual_scores)


def test_the_smallest_image_has_one_score_and_smaller_ones_are_rejected() -> None:
    config = AdversaryConfig(channels=4, levels=2)
    assert PatchDiscriminator(config, (12, 13))(torch.zeros(1, 3, 12, 13)).shape == (1, 1, 1, 1)
    with pytest.raises(InputError, match="levels 2 needs images of at least 12 pixels per side, got 20 x 11"):
        PatchDiscriminator(config, (20, 11))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "adversary.weight"),
        ({"start_step": -1}, "adversary.start_step"),
        ({"levels": 0}, "adversary.levels"),
        ({"channels": 0}, "adversary.channels"),
        ({"lr_factor": 0.0}, "adversary.lr_factor"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdversaryConfig(**options)  # type: ignore[arg-type]


def test_the_hinge_loss_has_a_margin_of_one_on_both_sides() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))


def test_the_adaptive_weight_equals_the_ratio_of_autograd_gradients_at_the_last_layer() -> None:
    torch.manual_seed(0)
    last, maps = nn.Conv2d(6, 3, 3, padding=1), torch.randn(2, 6, 8, 8)
    images, critic = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 1, 3)
    decoded = last(maps)
    losses = ((decoded - images).square().mean(), -critic(decoded).mean())
    expected = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in losses]
    gradients = [
        last_layer_gradient(last, maps, torch.autograd.grad(loss, decoded, retain_graph=True)[0]) for loss in losses
    ]
    assert float(adaptive_weight(*gradients)) == pytest.approx(float(expected[0] / expected[1]), rel=1e-5)
    assert float(adaptive_weight(gradients[0], 0 * gradients[0])) == 1e4
    assert float(adaptive_weight(0 * gradients[0], 0 * gradients[0])) == 0


def test_attach_gradient_keeps_the_value_and_sets_the_gradient() -> None:
    x, gradient = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    value = attach_gradient(torch.tensor(7.0), x, gradient)
    (2 * value).backward()
    assert value.item() == 7.0
    torch.testing.assert_close(x.grad, 2 * gradient)
