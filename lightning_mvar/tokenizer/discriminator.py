"""Patch discriminator of the tokenizer, its loss, and the adaptive weight of the adversarial loss.

| paper                                 | here                  | source                                              |
|---------------------------------------|-----------------------|-----------------------------------------------------|
| PatchGAN, 70 x 70                     | PatchDiscriminator    | pix2pix, arXiv 1611.07004, section 3.2              |
| hinge loss                            | hinge_loss            | arXiv 1705.02894                                    |
| lambda, from gradients at the last    | adaptive_weight       | VQGAN, arXiv 2012.09841, equation 7                 |
| layer of the decoder                  |                       |                                                     |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from lightning_mvar.errors import InputError, require_in
from lightning_mvar.scales import Shape, format_shape
from lightning_mvar.tokenizer.autoencoder import GroupNorm

MAX_ADAPTIVE_WEIGHT = 1e4  # reached if the discriminator's gradient vanishes


@dataclass(frozen=True)
class AdversaryConfig:
    """Discriminator trained against the tokenizer.

    Args:
        weight: weight of the adversarial loss; 0 disables the discriminator.
        adaptive: multiply the weight by the ratio of gradient norms, reconstruction losses over adversarial loss, at
            the decoder's last layer (VQGAN). Keeps the balance of both losses constant throughout training.
        start_step: first step at which the discriminator is trained and its loss used.
        lr_factor: the discriminator's learning rate as a multiple of the tokenizer's.
        channels: channels of the first level; doubled per level, up to eight times.
        levels: number of convolutions of stride 2; with three, each score covers a patch of 70 x 70 pixels.
    """

    weight: float = 0.0
    adaptive: bool = True
    start_step: int = 0
    lr_factor: float = 1.0
    channels: int = 64
    levels: int = 3

    def __post_init__(self) -> None:
        require_in("[0, inf)", "adversary.", weight=self.weight, start_step=self.start_step)
        require_in("[1, inf)", "adversary.", channels=self.channels, levels=self.levels)
        require_in("(0, inf)", "adversary.", lr_factor=self.lr_factor)


def min_image_side(config: AdversaryConfig) -> int:
    """Returns the side in pixels of the smallest image that yields a score."""
    return 3 * 2**config.levels


class PatchDiscriminator(nn.Sequential):
    """Images (b, 3, H, W) in [-1, 1] -> scores (b, 1, h, w), high for patches that look real.

    Uses GroupNorm instead of the published BatchNorm: a score depends only on its own image, so it does not change with
    the distribution of a batch over devices.

    Args:
        config: size of the discriminator.
        shape: height and width of the images.

    Raises:
        InputError: if the images are too small for `config.levels`.
    """

    def __init__(self, config: AdversaryConfig, shape: Shape) -> None:
        if min(shape) < min_image_side(config):
            raise InputError(
                f"adversary.levels {config.levels} needs images of at least {min_image_side(config)} pixels per side, "
                f"got {format_shape(shape)}: use fewer levels or larger images"
            )
        widths = [config.channels * min(2**level, 8) for level in range(config.levels + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, config.levels + 1):
            stride = 2 if level < config.levels else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, padding=1, bias=False),
                GroupNorm(math.gcd(32, widths[level]), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Returns () the discriminator loss, given its scores of real and reconstructed images."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def last_layer_gradient(last: nn.Conv2d, maps: Tensor, gradient: Tensor) -> Tensor:
    """Returns the weight gradient of the decoder's `last` convolution, up to a constant factor.

    Computed explicitly, because a sharded weight is not a leaf for autograd.

    Args:
        last: 3 x 3 convolution of stride 1.
        maps: (b, c, H, W) input of `last`.
        gradient: (b, 3, H, W) gradient of its output.
    """
    scaled = (gradient * gradient.numel()).to(maps.dtype)  # undoes the mean over pixels, which would underflow float16
    return conv2d_weight(maps.detach(), last.weight.shape, scaled, padding=1).float()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """Returns () the ratio of the norms of two gradients, at most MAX_ADAPTIVE_WEIGHT; 0 if both vanish."""
    ratio = reconstruction.norm() / adversarial.norm()
    return ratio.nan_to_num(nan=0.0, posinf=MAX_ADAPTIVE_WEIGHT).clamp(max=MAX_ADAPTIVE_WEIGHT)


def attach_gradient(value: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
    """Returns () a scalar equal to `value` whose gradient with respect to `target` is `gradient`."""
    surrogate = (target * gradient).sum()
    return value.detach() + (surrogate - surrogate.detach())
