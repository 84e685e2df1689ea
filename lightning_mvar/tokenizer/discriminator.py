"""The adversary of the tokenizer: judges patches of images, and how hard the tokenizer tries to please it.

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

from lightning_mvar.errors import InputError
from lightning_mvar.scales import Shape, in_words

LARGEST_WEIGHT = 1e4  # of the adaptive one, where the discriminator's gradient vanishes


@dataclass(frozen=True)
class AdversaryConfig:
    """A discriminator that is trained against the tokenizer.

    Args:
        weight: of the adversarial loss; 0 for no discriminator.
        adaptive: multiply the weight by the ratio of the gradients that the other losses of the image and the
            adversarial one have at the decoder's last layer (VQGAN), so that it means the same throughout training.
        start_step: the discriminator is first trained, and first heeded, in this step.
        lr_factor: the discriminator's learning rate over the tokenizer's.
        channels: of its first level; doubled from level to level up to eight times.
        levels: convolutions of stride 2; with three, a score is that of a patch of 70 x 70 pixels.
    """

    weight: float = 0.0
    adaptive: bool = True
    start_step: int = 0
    lr_factor: float = 1.0
    channels: int = 64
    levels: int = 3

    def __post_init__(self) -> None:
        for name, least in (("weight", 0), ("start_step", 0), ("channels", 1), ("levels", 1)):
            if getattr(self, name) < least:
                raise InputError(f"adversary.{name} must be at least {least}, got {getattr(self, name)}")
        if self.lr_factor <= 0:
            raise InputError(f"adversary.lr_factor must be positive, got {self.lr_factor}")


def least_side(config: AdversaryConfig) -> int:
    """Pixels of the smallest image that a discriminator has a score of."""
    return 3 * 2**config.levels


class PatchDiscriminator(nn.Sequential):
    """Images (b, 3, H, W) in [-1, 1] -> scores (b, 1, h, w), high where a patch looks real.

    Normalized within each image (GroupNorm), where published ones have BatchNorm: a score depends on its own image
    alone, so that it is the same however a batch is spread over devices.

    Args:
        config: its size.
        shape: height and width of the images.

    Raises:
        InputError: if the images are too small for so many levels.
    """

    def __init__(self, config: AdversaryConfig, shape: Shape) -> None:
        if min(shape) < least_side(config):
            raise InputError(
                f"a discriminator of adversary.levels {config.levels} needs images of {least_side(config)} pixels or "
                f"more a side, got {in_words(shape)}"
            )
        widths = [config.channels * min(2**level, 8) for level in range(config.levels + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, config.levels + 1):
            stride = 2 if level < config.levels else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, widths[level]), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """() what the discriminator minimizes, from its scores of real and of reconstructed images."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def last_layer_gradient(last: nn.Conv2d, maps: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the weight of the decoder's `last` convolution, up to a constant factor.

    Computed from what the convolution saw, and not asked of autograd, for which a sharded weight is no leaf.

    Args:
        last: 3 x 3, of stride 1.
        maps: (b, c, H, W) its input.
        gradient: (b, 3, H, W) of its output.
    """
    scaled = (gradient * gradient.numel()).to(maps.dtype)  # the mean over all pixels would vanish in float16
    return conv2d_weight(maps.detach(), last.weight.shape, scaled, padding=1).float()


def adaptive_weight(others: Tensor, adversarial: Tensor) -> Tensor:
    """() the ratio of two gradients' norms; 0 where both vanish."""
    ratio = others.norm() / adversarial.norm()
    return ratio.nan_to_num(nan=0.0, posinf=LARGEST_WEIGHT).clamp(max=LARGEST_WEIGHT)


def with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """() a number that is `value` and whose gradient by `at` is `gradient`."""
    carrier = (at * gradient).sum()
    return value.detach() + (carrier - carrier.detach())
