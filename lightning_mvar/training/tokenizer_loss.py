"""Losses of the tokenizer: reconstruction, quantization, adversary and codebook entropy (VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mvar.tokenizer.codebook import CodebookConfig, entropy_loss
from lightning_mvar.tokenizer.discriminator import (
    AdversaryConfig,
    PatchDiscriminator,
    adaptive_weight,
    attach_gradient,
    hinge_loss,
    last_layer_gradient,
)
from lightning_mvar.tokenizer.tokenizer import Reconstruction, Tokenizer
from lightning_mvar.training.collectives import mean_over_ranks

GRADIENT_SCALE = 2.0**16  # initial scale of float16 loss scaling; a power of two does not round


class TokenizerLoss:
    """The loss of `LitTokenizer`, whose docstring has the formula and the arguments.

    It is not a module: the perceptual distance is neither trained nor saved, and the tokenizer belongs to LitTokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        l1_weight: float,
        commitment: float,
        perceptual: nn.Module | None,
        perceptual_weight: float,
        adversary: AdversaryConfig,
        codebook: CodebookConfig,
    ) -> None:
        self.tokenizer, self.l1_weight, self.commitment = tokenizer, l1_weight, commitment
        self.perceptual = None if perceptual is None else perceptual.eval().requires_grad_(False)
        self.perceptual_weight, self.adversary, self.codebook = perceptual_weight, adversary, codebook

    def terms(
        self, images: Tensor, reconstruction: Reconstruction, decoded: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns all loss terms except the adversarial and entropy terms, with their sum `loss`, and the image loss.

        Args:
            images: (b, 3, H, W) in [-1, 1].
            reconstruction: the tokenizer's output for the images.
            decoded: (b, 3, H, W) reconstructions to compare with the images.
        """
        losses = {"l2": F.mse_loss(decoded, images), "l1": F.l1_loss(decoded, images)}
        image_loss = losses["l2"] + self.l1_weight * losses["l1"]
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual.to(images.device)(decoded, images).mean()
            image_loss = image_loss + self.perceptual_weight * losses["perceptual"]
        codebook, commitment = reconstruction.codebook, reconstruction.commitment
        loss = image_loss + codebook + self.commitment * commitment
        return {"loss": loss, **losses, "codebook": codebook, "commitment": commitment}, image_loss

    def adversarial_terms(
        self, discriminator: PatchDiscriminator, images: Tensor, reconstruction: Reconstruction
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the loss terms with a discriminator, and a loss whose gradient trains each network with its own loss.

        The reconstructions are detached from the graph, and the gradient of the image losses with respect to them is
        attached again. This leaves the discriminator's weights unaffected without running it twice.
        """
        outputs = reconstruction.decoded.float()  # float16 lacks the range for this gradient
        decoded = outputs.detach().requires_grad_()
        losses, image_loss = self.terms(images, reconstruction, decoded)
        image_gradient = torch.autograd.grad(GRADIENT_SCALE * image_loss, decoded)[0] / GRADIENT_SCALE
        real, fake = discriminator(torch.cat([images, decoded])).chunk(2)
        (adversarial_gradient,) = torch.autograd.grad(-fake.float().sum(), decoded, retain_graph=True)
        adversarial_gradient = adversarial_gradient / fake.numel()  # the mean's gradient would underflow in float16
        weight = self.adversary.weight * self.adaptive_weight(reconstruction.maps, image_gradient, adversarial_gradient)
        losses |= {"adversarial": -fake.detach().float().mean(), "discriminator": hinge_loss(real, fake)}
        losses["adversary_weight"] = weight
        image_loss = image_loss + weight * losses["adversarial"]
        image_loss = attach_gradient(image_loss, outputs, image_gradient + weight * adversarial_gradient)
        quantizer_loss = losses["codebook"] + self.commitment * losses["commitment"]
        return losses, quantizer_loss + image_loss + losses["discriminator"]

    def adaptive_weight(self, maps: Tensor, image_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
        """Returns () VQGAN's ratio of the two gradients at the decoder's last layer, averaged over all ranks."""
        if not self.adversary.adaptive:
            return image_gradient.new_ones(())
        last, gradients = self.tokenizer.decoder.conv_out, (image_gradient, adversarial_gradient)
        at_last_layer = torch.stack([last_layer_gradient(last, maps, gradient) for gradient in gradients])
        return adaptive_weight(*mean_over_ranks(at_last_layer))

    def entropy(self, reconstruction: Reconstruction) -> Tensor:
        """Returns () the entropy terms, see `entropy_loss`."""
        features, steps, codes = reconstruction.features, reconstruction.steps, reconstruction.codes
        return entropy_loss(self.tokenizer.quantizer, features, steps, codes, self.codebook, mean_over_ranks)
