"""Pictures from a trained network in one line, from a folder or from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from PIL import Image, ImageOps
from torch import Tensor

from lightning_mvar.checkpoints import TrainedModel, load_trained, save_folder
from lightning_mvar.data.classes import Classes
from lightning_mvar.data.images.decoding import to_tensor
from lightning_mvar.devices import DTYPES, Precision, choose_device
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.generate import Known, Step, decoded, draw_scales, image_generators, tokens_kept
from lightning_mvar.sampling.grids import to_uint8
from lightning_mvar.scales import Shape, in_words

FILES = ["config.json", "*.safetensors"]  # of a folder of `export`


class MVARPipeline(ModelHubMixin, library_name="lightning_mvar", tags=["image-generation", "var", "mvar"]):
    """Draws pictures of classes, and redraws parts of given ones.

        pipe = MVARPipeline.from_pretrained("outputs/demo/export")
        pipe(["3", "7"], guidance=0.45)[0].save("three.png")

    `save_pretrained` and `push_to_hub` write what `lightning-mvar export` writes.

    Args:
        model: network and tokenizer, which are moved to the device.
        device: auto, cpu, cuda or cuda:N.
        precision: of network and decoder.
    """

    def __init__(self, model: TrainedModel, device: str = "auto", precision: Precision = "float32") -> None:
        self.device = choose_device(device)
        self.network = model.network.to(self.device).lower(DTYPES[precision])
        self.tokenizer = model.tokenizer.to(self.device).lower(DTYPES[precision])
        self.class_names = model.class_names
        self.classes = Classes(model.class_names, model.network.config.num_classes)

    @property
    def shape(self) -> Shape:
        """Height and width of the pictures, in pixels."""
        return self.tokenizer.config.shape

    def __call__(self, classes: Sequence[str | int] | str | int, **settings: Any) -> list[Image.Image]:
        """A picture of each class; the arguments are those of `steps`."""
        for step in self.steps(classes, **settings):
            last = step.f_hat
        return self.pictures(last)

    def edit(
        self, image: Image.Image, mask: Image.Image, classes: Sequence[str | int] | str | int, **settings: Any
    ) -> list[Image.Image]:
        """`image` with what is white in `mask` drawn anew, once for each class; see `steps`."""
        return self(classes, image=image, mask=mask, **settings)

    def forming(self, classes: Sequence[str | int] | str | int, **settings: Any) -> Iterator[list[Image.Image]]:
        """Pictures as they are after each scale, coarse to fine, the last ones whole; see `steps`."""
        for step in self.steps(classes, **settings):
            yield self.pictures(step.f_hat)

    def steps(
        self,
        classes: Sequence[str | int] | str | int,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        seed: int = 0,
        guidance: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        smooth: bool = False,
    ) -> Iterator[Step]:
        """Draw scale by scale.

        Args:
            classes: a name, a number, or "unconditional" for each picture; one alone for a single picture.
            image: a picture to keep a part of, of any size; what does not fit is cut off. See `tokens_kept`.
            mask: of the size of `image`, or as large as the pictures are: white where to draw, black where to keep.
            seed: picture i of a seed is the same in any number of them.
            guidance, top_k, top_p, smooth: of the sampling; see `generate`.

        Raises:
            InputError: if a class is unknown, an argument is out of range, or the mask is of another size.
        """
        if image is None and mask is not None:
            raise InputError("a mask needs an image to keep the rest of")
        wanted = [classes] if isinstance(classes, str | int) else classes
        labels = torch.tensor([self.classes.label(each) for each in wanted], device=self.device)
        known = None if image is None else self.known(image, mask, len(labels))
        return draw_scales(
            self.network,
            self.tokenizer,
            labels,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            smooth=smooth,
            generator=image_generators(seed, range(len(labels))),
            known=known,
        )

    @torch.no_grad()
    def known(self, image: Image.Image, mask: Image.Image | None, count: int) -> Known:
        """What is kept of an image, for each of `count` pictures; without a mask, everything."""
        tokens = self.tokenizer.encode(to_tensor(fitted(image.convert("RGB"), self.shape))[None].to(self.device))
        keep = torch.ones_like(tokens[0], dtype=torch.bool)
        if mask is not None:
            if mask.size not in (image.size, self.shape[::-1]):
                raise InputError(
                    f"the mask is {size_of(mask)}: it must be as large as the image, {size_of(image)}, or as the "
                    f"pictures, {in_words(self.shape)}"
                )
            black = torch.from_numpy(np.array(fitted(mask.convert("L"), self.shape))) < 128
            keep = tokens_kept(self.network.config.schedule, black).to(self.device)
        return Known(tokens.expand(count, -1), keep.expand(count, -1))

    def pictures(self, f_hat: Tensor) -> list[Image.Image]:
        """(b, c, s, t) -> b pictures."""
        return [Image.fromarray(pixels) for pixels in to_uint8(decoded(self.tokenizer, f_hat))]

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.network.input_proj.weight.dtype != torch.float32:
            raise InputError("weights of lower precision are not saved: load the pipeline with precision float32")
        save_folder(save_directory, self.tokenizer, self.network, self.class_names)

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # two options of our own
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: str = "auto",
        precision: Precision = "float32",
    ) -> MVARPipeline:
        """From a folder of `export`, or a repository on the Hub that holds one."""
        if Path(model_id).is_dir():
            return cls(load_trained(model_id), device, precision)
        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=FILES,
        )
        return cls(load_trained(folder), device, precision)


def fitted(image: Image.Image, shape: Shape) -> Image.Image:
    """The middle of a picture, resized to a height and width."""
    return ImageOps.fit(image, shape[::-1], Image.Resampling.LANCZOS)


def size_of(image: Image.Image) -> str:
    return in_words((image.height, image.width))
