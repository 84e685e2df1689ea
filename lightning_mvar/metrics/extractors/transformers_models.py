"""Any image model of Hugging Face transformers (`pip install transformers`) as a feature extractor."""

from __future__ import annotations

from torch import Tensor

from lightning_mvar.errors import InputError, one_line, require_package
from lightning_mvar.metrics.extractors.pretrained import PretrainedExtractor

BILINEAR = 2  # Pillow's number for the filter, as in the models' preprocessing files


class Transformers(PretrainedExtractor):
    """Pooled features of a pretrained model of transformers, such as DINOv2, SigLIP, CLIP or ConvNeXt.

    Image size, mean and standard deviation come from the model's preprocessing. Images are resized without cropping.
    For a model of images and texts, the features are those of its vision model.

    Args:
        model: name on the Hugging Face Hub, such as `facebook/dinov2-base`, or a folder. transformers downloads its
            weights on first use, as safetensors; no code from the repository is run.

    Raises:
        InputError: if transformers is not installed, the model is unavailable, or it has no pooled features.
    """

    def __init__(self, model: str) -> None:
        require_package("transformers", "transformers", "--extractor Transformers")
        from transformers import AutoModel, ImageProcessingMixin

        try:
            config, _ = ImageProcessingMixin.get_image_processor_dict(model)
            network, report = AutoModel.from_pretrained(
                model, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise InputError(f"transformers cannot load {model} ({one_line(error):.200})") from error
        network = getattr(network, "vision_model", network).float().eval()
        if missing := sorted(report["missing_keys"]):
            raise InputError(f"{model} has no weights {missing[0]}: its pooled features would be random")
        try:
            size = config.get("crop_size") or config["size"]
            side = size if isinstance(size, int) else size.get("shortest_edge")
            shape = (side, side) if side else (size["height"], size["width"])
            mean, std = config["image_mean"], config["image_std"]
        except (KeyError, AttributeError) as error:
            raise InputError(f"{model} does not specify the size, mean and std of its images") from error
        try:
            super().__init__(model, network, shape, mean, std, config.get("resample") == BILINEAR)
        except AttributeError as error:
            raise InputError(f"{model} has no pooled features") from error

    def pooled(self, pixels: Tensor) -> Tensor:
        return self.network(pixels).pooler_output.flatten(1)  # that of convolutional networks is (b, f, 1, 1)
