"""Any image model of timm (`pip install timm`) as a feature extractor, without a line of code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mvar.devices import exact_float32, without_autocast
from lightning_mvar.errors import InputError, one_line, require_package
from lightning_mvar.metrics.extractors.preprocessing import preprocess


class Timm(nn.Module):
    """Pooled features of a pretrained model of timm, such as CLIP, SigLIP, MAE, ConvNeXt or DINOv2.

    Size, mean and standard deviation of the pixels are those of the model's configuration; whole images are resized.

    Args:
        model: name in timm, such as `vit_base_patch16_clip_224.openai`, or `hf-hub:USER/MODEL` for a timm model on the
            Hugging Face Hub. Its weights are downloaded the first time, by timm.

    Raises:
        InputError: if timm is not installed, has no such model, or cannot download it.
    """

    def __init__(self, model: str) -> None:
        require_package("timm", "timm", "--extractor Timm")
        import timm

        super().__init__()
        self.model = model
        try:
            self.network = timm.create_model(model, pretrained=True, num_classes=0).eval()
        except OSError as error:
            raise InputError(
                f"timm cannot download {model} ({one_line(error):.200}): check its name and the network"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"timm cannot load {model} ({one_line(error):.200}): timm.list_models() names all"
            ) from error
        config = timm.data.resolve_model_data_config(self.network)
        self.shape, self.mean, self.std = config["input_size"][1:], config["mean"], config["std"]
        self.mode = config["interpolation"] if config["interpolation"] == "bilinear" else "bicubic"
        self.resize = f"Pillow's {self.mode}, to {self.shape[0]} x {self.shape[1]}"
        with torch.no_grad():
            self.num_features = self.network(torch.zeros(1, 3, *self.shape)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (b, 3, H, W) in [0, 1] to features (b, num_features), in float32 even under autocast."""
        with without_autocast(images), exact_float32():
            return self.network(preprocess(images, self.shape, self.mean, self.std, self.mode))
