"""Any image model of timm (`pip install timm`) as a feature extractor."""

from __future__ import annotations

from lightning_mvar.errors import InputError, one_line, require_package
from lightning_mvar.metrics.extractors.pretrained import PretrainedExtractor


class Timm(PretrainedExtractor):
    """Pooled features of a pretrained model of timm, such as CLIP, SigLIP, MAE, ConvNeXt or DINOv2.

    Image size, mean and standard deviation come from the model's configuration. Images are resized without cropping.

    Args:
        model: name in timm, such as `vit_base_patch16_clip_224.openai`, or `hf-hub:USER/MODEL` for a timm model on the
            Hugging Face Hub. timm downloads its weights on first use.

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
                f"timm cannot download {model} ({one_line(error):.200}): check its name and the internet connection"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"timm cannot load {model} ({one_line(error):.200}): timm.list_models() lists all models"
            ) from error
        config = timm.data.resolve_model_data_config(network)
        bilinear = config["interpolation"] == "bilinear"
        super().__init__(model, network, config["input_size"][1:], config["mean"], config["std"], bilinear)
