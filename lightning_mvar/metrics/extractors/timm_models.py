"""Any image model of timm (`pip install timm`) as a feature extractor, without a line of code."""

from __future__ import annotations

from lightning_mvar.errors import InputError, one_line, require_package
from lightning_mvar.metrics.extractors.pretrained import PretrainedExtractor


class Timm(PretrainedExtractor):
    """Pooled features of a pretrained model of timm, such as CLIP, SigLIP, MAE, ConvNeXt or DINOv2.

    Size, mean and standard deviation of the pixels are those of the model's configuration; whole images are resized.

    Args:
        model: name in timm, such as `vit_base_patch16_clip_224.openai`, or `hf-hub:USER/MODEL` for a timm model on the
            Hugging Face Hub. Its weights are downloaded on first use, by timm.

    Raises:
        InputError: if timm is not installed, has no such model, or cannot download it.
    """

    def __init__(self, model: str) -> None:
        require_package("timm", "timm", "--extractor Timm")
        import timm

        try:
            network = timm.create_model(model, pretrained=True, num_classes=0).eval()
        except OSError as error:
            raise InputError(
                f"timm cannot download {model} ({one_line(error):.200}): check its name and the network"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"timm cannot load {model} ({one_line(error):.200}): timm.list_models() names all"
            ) from error
        config = timm.data.resolve_model_data_config(network)
        bilinear = config["interpolation"] == "bilinear"
        super().__init__(model, network, config["input_size"][1:], config["mean"], config["std"], bilinear)
