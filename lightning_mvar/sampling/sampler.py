"""Sampler of a trained model on one device, with one random stream per image number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_mvar.checkpoints.pair import TrainedModel
from lightning_mvar.data.classes import Classes
from lightning_mvar.devices import DTYPES, Precision, set_tf32
from lightning_mvar.models.parameters import lower_precision
from lightning_mvar.sampling.generate import decode_images, draw_images, draw_scales
from lightning_mvar.sampling.graphs import graphs_for
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import KnownTokens, Step


class Sampler:
    """Draws images with a network and its tokenizer, which it moves to a device and lowers to a precision.

    Args:
        model: network, tokenizer and class names.
        device: device to draw on.
        precision: precision of network and decoder; sets that of float32 products in this process, see `set_tf32`.
        graphs: on CUDA, replay CUDA graphs from the second batch on; see `ScaleGraphs`.
    """

    def __init__(
        self, model: TrainedModel, device: torch.device, precision: Precision = "float32", graphs: bool = True
    ) -> None:
        self.device = device
        set_tf32(precision == "tf32")
        self.network = lower_precision(model.network.to(device), DTYPES[precision])
        self.tokenizer = model.tokenizer.to(device).lower(DTYPES[precision])
        self.graphs = graphs_for(self.network) if graphs else None
        self.class_names = model.class_names
        self.classes = Classes(model.class_names, model.network.config.num_classes)

    def steps(
        self, labels: Tensor, settings: SamplingSettings, numbers: Iterable[int], known: KnownTokens | None = None
    ) -> Iterator[Step]:
        """Draws scale by scale, coarse to fine.

        Args:
            labels: (b,) int64 classes in [0, num_classes]; `num_classes` means unconditional.
            settings: sampling settings.
            numbers: number of each image; with the seed it determines the image's random stream.
            known: tokens of given images, and which of them to keep.
        """
        keys = settings.keys(numbers)
        return draw_scales(self.network, self.tokenizer, labels, settings, keys, known, self.graphs)

    def stream_images(self, labels: Tensor, settings: SamplingSettings, numbers: Iterable[int]) -> Iterator[Tensor]:
        """Yields the images (b, 3, H, W) in [0, 1] decoded after each scale; see `steps`."""
        for step in self.steps(labels, settings, numbers):
            yield decode_images(self.tokenizer, step.f_hat)

    def draw(self, labels: Tensor, settings: SamplingSettings, numbers: Iterable[int]) -> Tensor:
        """Draws images (b, 3, H, W) in [0, 1]; see `steps`."""
        keys = settings.keys(numbers)
        return draw_images(self.network, self.tokenizer, labels, settings, keys, graphs=self.graphs)[0]
