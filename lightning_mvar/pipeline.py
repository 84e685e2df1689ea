"""Pipeline that draws images with a trained network, loaded from a folder or the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from lightning_mvar.checkpoints import TrainedModel, load_trained, save_folder
from lightning_mvar.checkpoints.card import Card, is_edited, model_card, require_owner
from lightning_mvar.data.images.decoding import to_rgb, to_tensor
from lightning_mvar.devices import Precision, choose_device
from lightning_mvar.errors import InputError
from lightning_mvar.io.hub import locate
from lightning_mvar.sampling.generate import decode_images, kept_tokens_mask
from lightning_mvar.sampling.sampler import Sampler, drawn_pixels, label_tensor
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import KnownTokens, Step
from lightning_mvar.scales import Shape, format_shape

ClassChoice = Iterable[str | int] | NDArray[np.integer] | Tensor | str | int


class MVARPipeline(ModelHubMixin):
    """Draws images of given classes and inpaints given images.

        pipe = MVARPipeline.from_pretrained("outputs/demo/export")
        pipe(["3", "7"], guidance=0.45)[0].save("three.png")

    `save_pretrained` and `push_to_hub` write the same files as `lightning-mvar export`; `model_card_kwargs` are the
    arguments of `checkpoints.card.model_card`.

    Args:
        model: network and tokenizer; both are moved to the device.
        device: auto, cpu, cuda or cuda:N.
        precision: precision of network and decoder.
    """

    def __init__(self, model: TrainedModel, device: str = "auto", precision: Precision = "float32") -> None:
        self.precision = precision
        sampler = self.sampler = Sampler(model, choose_device(device), precision)
        self.network, self.tokenizer = sampler.network, sampler.tokenizer
        self.class_names, self.classes = sampler.class_names, sampler.classes

    @property
    def model(self) -> TrainedModel:
        """Network, tokenizer and class names."""
        return TrainedModel(self.network, self.tokenizer, self.class_names)

    @property
    def device(self) -> torch.device:
        """The device of network and tokenizer."""
        return self.sampler.device

    def __repr__(self) -> str:
        config, size = self.network.config, format_shape(self.shape)
        count = sum(parameter.numel() for parameter in self.network.parameters())
        network = f"{count / 1e6:.1f}M parameters, {config.depth} blocks, {config.num_classes} classes"
        return f"{type(self).__name__}({network}, {size} pixels, device={self.device})"

    @property
    def shape(self) -> Shape:
        """Height and width of the images, in pixels."""
        return self.tokenizer.config.shape

    def to(self, device: str | torch.device) -> MVARPipeline:
        """Moves network and tokenizer to a device, and returns the pipeline."""
        self.sampler = Sampler(self.model, choose_device(str(device)), self.precision)
        return self

    def __call__(
        self,
        classes: ClassChoice,
        *,
        num_images: int = 1,
        generator: torch.Generator | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draws images.

        Args:
            classes: see `steps`.
            num_images: consecutive images per entry of `classes`.
            generator: draws a new seed in each call; an alternative to the setting `seed`.
            progress: whether to show a progress bar over the scales if drawing takes longer than a second.
            settings: the other arguments of `steps`.
        """
        if generator is not None:
            if "seed" in settings:
                raise InputError("give seed or generator, not both")
            settings["seed"] = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        repeated = [entry for entry in list_entries(classes) for _ in range(num_images)]
        scales = self.network.config.schedule.num_scales
        for step in tqdm(
            self.steps(repeated, **settings), "scales", scales, disable=not progress, leave=False, delay=1
        ):
            last = step.f_hat
        return self.to_images(last)

    def edit(self, image: Image.Image, mask: Image.Image, classes: ClassChoice, **settings: Any) -> list[Image.Image]:
        """Redraws the white part of `mask` in `image`, once per entry of `classes`; see `steps`."""
        return self(classes, image=image, mask=mask, **settings)

    def stream_images(self, classes: ClassChoice, **settings: Any) -> Iterator[list[Image.Image]]:
        """Yields the images decoded after each scale, coarse to fine; the last ones are complete. See `steps`."""
        for step in self.steps(classes, **settings):
            yield self.to_images(step.f_hat)

    def steps(
        self,
        classes: ClassChoice,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        **sampling: Any,
    ) -> Iterator[Step]:
        """Draws scale by scale.

        Args:
            classes: name, number or "unconditional", one per image; a single value draws one image. Numbers may be an
                array or tensor of integers. "3:0.7+8:0.3" mixes the embeddings of classes.
            image: image to edit, of any size; resized and center-cropped. See `kept_tokens_mask`.
            mask: white where to draw, black where to keep, in the size of `image` or of the drawn images.
            sampling: `SamplingSettings` by name: guidance, top_k, top_p, smooth, seed and others.

        Raises:
            InputError: if a class is unknown, an argument is out of range, or the mask has another size.
        """
        if image is None and mask is not None:
            raise InputError("a mask needs an image: pass the image to edit as well")
        labels = self.labels_of(classes)
        known = None if image is None else self.known_tokens(image, mask, len(labels))
        return self.sampler.steps(labels, SamplingSettings(**sampling), range(len(labels)), known)

    def labels_of(self, classes: ClassChoice) -> Tensor:
        """Returns labels (b,) int64, or weights (b, num_classes + 1) if some entries mix classes."""
        return label_tensor([self.classes.weights(entry) for entry in list_entries(classes)], self.classes.count)

    @torch.no_grad()
    def known_tokens(self, image: Image.Image, mask: Image.Image | None, count: int) -> KnownTokens:
        """Returns the tokens of an image, repeated `count` times, and which of them to keep; all without a mask."""
        tokens = self.tokenizer.encode(to_tensor(fitted(to_rgb(image), self.shape))[None].to(self.device))
        keep = torch.ones_like(tokens[0], dtype=torch.bool)
        if mask is not None:
            if mask.size not in (image.size, self.shape[::-1]):
                raise InputError(
                    f"the mask is {format_size(mask)}: resize it to the size of the image, {format_size(image)}, or of "
                    f"the drawn images, {format_shape(self.shape)}"
                )
            black = torch.from_numpy(np.array(fitted(to_rgb(mask).convert("L"), self.shape))) < 128
            keep = kept_tokens_mask(self.network.config.schedule, black).to(self.device)
        return KnownTokens(tokens.expand(count, -1), keep.expand(count, -1))

    def to_images(self, f_hat: Tensor) -> list[Image.Image]:
        """Decodes features (b, c, s, t) to b images; raises InputError if some are not finite."""
        return [Image.fromarray(pixels) for pixels in drawn_pixels(decode_images(self.tokenizer, f_hat))]

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.network.input_proj.weight.dtype != torch.float32:
            raise InputError("weights in lower precision cannot be saved: load the pipeline with precision float32")
        save_folder(save_directory, self.tokenizer, self.network, self.class_names)
        card = save_directory / "README.md"
        if not is_edited(card):
            card.unlink(missing_ok=True)  # otherwise the mixin would keep the previous network's card

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **hub: Any) -> str:
        """Uploads the pipeline with its model card, which replaces the one on the Hub.

        Args:
            repo_id: OWNER/NAME on the Hub.
            model_card_kwargs: arguments of `checkpoints.card.model_card`.
            hub: other arguments of `ModelHubMixin.push_to_hub`.

        Raises:
            InputError: if the owner is missing, or the model card cannot be made.
        """
        require_owner(repo_id)
        return super().push_to_hub(
            repo_id, model_card_kwargs={"repository": repo_id} | (model_card_kwargs or {}), **hub
        )

    def generate_model_card(self, **card: Any) -> Card:
        """Returns the model card; see `checkpoints.card.model_card` for its arguments."""
        return model_card(self.model, **card)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's reads config.json first, unchecked
        cls,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
        device: str = "auto",
        precision: Precision = "float32",
        **hub: Any,
    ) -> MVARPipeline:
        """Loads a folder of `export`, a training checkpoint, published weights, or a name on the Hub.

        Args:
            path: path, `var-d16` or another known name, OWNER/REPOSITORY of a pipeline, or OWNER/REPOSITORY:FILE.
            tokenizer: folder, published file or name of the tokenizer, if it has moved or the network has none.
            revision: branch, tag or commit of the repository at `path`; a tokenizer's is written NAME@REVISION.
            device: auto, cpu, cuda or cuda:N.
            precision: precision of network and decoder.
            hub: other options of huggingface_hub's downloads: token, cache_dir.

        Raises:
            InputError: if network or tokenizer cannot be read.
        """
        network, default = locate(path, revision=revision, **hub)
        chosen = default if tokenizer is None else tokenizer
        located = None if chosen is None else locate(chosen, **hub).path
        return cls(load_trained(network, located), device, precision)


def list_entries(classes: ClassChoice) -> list[Any]:
    """Lists names and numbers; a single one becomes a list of one."""
    listed: Any = classes.tolist() if isinstance(classes, Tensor | np.ndarray) else classes
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        return [listed]
    return [entry.item() if isinstance(entry, Tensor) and entry.ndim == 0 else entry for entry in listed]


def fitted(image: Image.Image, shape: Shape) -> Image.Image:
    """Crops an image around its center to the aspect ratio of `shape` (height, width) and resizes it."""
    return ImageOps.fit(image, shape[::-1], Image.Resampling.LANCZOS)


def format_size(image: Image.Image) -> str:
    """Formats the size of an image for a message."""
    return format_shape((image.height, image.width))
