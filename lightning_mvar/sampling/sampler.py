"""Sampler that draws with a trained model on one device, with one random stream per image, and sets of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_mvar.checkpoints.pair import TrainedModel
from lightning_mvar.data.classes import Classes
from lightning_mvar.devices import DTYPES, Precision, rank_and_world_size, set_tf32
from lightning_mvar.errors import InputError
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.models.parameters import lower_precision
from lightning_mvar.sampling.costs import SamplingCosts, sampling_costs
from lightning_mvar.sampling.generate import decode_images, draw_scales
from lightning_mvar.sampling.graphs import graphs_for
from lightning_mvar.sampling.grids import to_uint8
from lightning_mvar.sampling.guidance import load_guide
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.steps import KnownTokens, Step
from lightning_mvar.sampling.writers import PixelArray

NumberedImages = tuple[list[int], PixelArray]  # image numbers, images


class Sampler:
    """Draws images with a network and its tokenizer, which it moves to a device and casts to a precision.

    Args:
        model: network, tokenizer and class names.
        device: device to draw on.
        precision: precision of network and decoder; also enables or disables TF32 in this process, see `set_tf32`.
        graphs: on CUDA, replay CUDA graphs from the second batch on; see `ScaleGraphs`.
    """

    def __init__(
        self, model: TrainedModel, device: torch.device, precision: Precision = "float32", graphs: bool = True
    ) -> None:
        self.device = device
        self.dtype = DTYPES[precision]
        set_tf32(precision == "tf32")
        self.network = lower_precision(model.network.to(device), self.dtype)
        self.tokenizer = model.tokenizer.to(device).lower(self.dtype)
        self.guides: dict[str, MVAR] = {}  # the last guide used, by path, so that a set has a single one
        self.graphs = graphs_for(self.network) if graphs else None
        self.class_names = model.class_names
        self.classes = Classes(model.class_names, model.network.config.num_classes)

    def guide(self, settings: SamplingSettings) -> MVAR | None:
        """Returns the guiding network if `settings` need one; the last one stays in memory.

        Raises:
            InputError: if it cannot be read, or has other tokens, classes or scales.
        """
        path = settings.guide.needed_network(self.network.config)
        if path is not None and path not in self.guides:
            guide = load_guide(settings.guide, self.network.config, self.tokenizer, self.class_names, self.dtype)
            assert guide is not None
            self.guides = {path: guide}
        return None if path is None else self.guides[path]

    def steps(
        self, labels: Tensor, settings: SamplingSettings, numbers: Iterable[int], known: KnownTokens | None = None
    ) -> Iterator[Step]:
        """Draws scale by scale, coarse to fine.

        Args:
            labels: (b,) int64 classes in [0, num_classes]; `num_classes` means unconditional. Or (b, num_classes + 1)
                weights of mixed classes, see `label_tensor`.
            settings: sampling settings.
            numbers: number of each image, which determines its random stream together with the seed.
            known: tokens of given images, and which of them to keep.
        """
        keys = settings.keys(numbers)
        return draw_scales(
            self.network, self.tokenizer, labels, settings, keys, known, self.graphs, self.guide(settings)
        )

    def stream_images(self, labels: Tensor, settings: SamplingSettings, numbers: Iterable[int]) -> Iterator[Tensor]:
        """Yields the images (b, 3, H, W) in [0, 1] decoded after each scale; see `steps`."""
        for step in self.steps(labels, settings, numbers):
            yield decode_images(self.tokenizer, step.f_hat)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Decodes tokens (b, l) int64 to images (b, 3, H, W) in [0, 1]."""
        return decode_images(self.tokenizer, self.tokenizer.quantizer.decode(tokens.to(self.device)))


def label_tensor(classes: Sequence[Mapping[int, float]], num_classes: int) -> Tensor:
    """Converts classes, given as weights by label, to labels (b,) int64, or weights (b, num_classes + 1) if any mix."""
    if all(len(weights) == 1 for weights in classes):
        return torch.tensor([label for weights in classes for label in weights], dtype=torch.int64)
    rows = torch.zeros(len(classes), num_classes + 1)
    for row, weights in zip(rows, classes, strict=True):
        row[list(weights)] = torch.tensor(list(weights.values()))
    return rows


def drawn_pixels(images: Tensor) -> PixelArray:
    """Rounds drawn images (b, 3, H, W) in [0, 1] to (b, H, W, 3) uint8.

    Raises:
        InputError: if some hold NaN, which would become black; gives their number.
    """
    require_finite(images)
    return to_uint8(images)


def require_finite(images: Tensor) -> None:
    """Raises InputError if some images (b, 3, H, W) or features (b, c, s, t) hold NaN, with their number."""
    broken = int(images.flatten(1).sum(dim=1).isnan().sum())
    if broken:
        raise InputError(
            f"{broken} of {len(images)} images are not finite: the network or the decoder overflows; use weights of an "
            f"earlier checkpoint, or precision float32"
        )


@dataclass
class Drawing:
    """A set of images to draw.

    Args:
        sampler: sampler on this rank's device.
        labels: (n,) class of each image, `per_class` consecutive images per class.
        per_class: images per class.
        settings: sampling settings.
        images_per_s: throughput of all devices while drawing the missing images; None before, or if none were missing.
        mixes: if some images mix classes, the weights by label for each group of `per_class` images; `labels` then have
            the class with the largest weight.
        advance: called after each scale of a batch with the share of work done, expressed as a number of images. On
            CUDA, the scale may only be queued by then.
    """

    sampler: Sampler
    labels: Tensor
    per_class: int
    settings: SamplingSettings
    images_per_s: float | None = None
    mixes: list[dict[int, float]] | None = None
    advance: Callable[[float], None] = lambda images: None

    def conditions(self, numbers: list[int]) -> Tensor:
        """Returns the labels (b,) of images, or class weights (b, num_classes + 1) if some images mix classes."""
        if self.mixes is None:
            return self.labels[numbers]
        return label_tensor([self.mixes[i // self.per_class] for i in numbers], self.sampler.classes.count)

    def name(self, number: int) -> str:
        """Returns the name of an image's class or mix of classes."""
        mix = {int(self.labels[number]): 1.0} if self.mixes is None else self.mixes[number // self.per_class]
        return self.sampler.classes.describe_weights(mix)

    def costs(self) -> SamplingCosts:
        """Counts the cost of drawing one image."""
        guide = self.sampler.guide(self.settings)
        return sampling_costs(self.settings, self.sampler.network.config, None if guide is None else guide.config)

    @cached_property
    def shares(self) -> list[float]:
        """Estimated share of each scale in the drawing time, in proportion to its tokens.

        The rest is decoding, which counts as one pass of the network over all tokens: in FLOPs, it is 0.9 passes of
        M-VAR-d16 and 1.3 of VAR-d16.
        """
        config = self.sampler.network.config
        guided, schedule = self.settings.guide.num_guided_scales(config), config.schedule
        passes = [length * (2 if k < guided else 1) for k, length in enumerate(schedule.lengths)]
        return [tokens / (sum(passes) + schedule.num_tokens) for tokens in passes]

    def draw(self, labels: Tensor, numbers: list[int]) -> PixelArray:
        """Draws images (b, H, W, 3) uint8, given their labels or class weights and their numbers."""
        for k, step in enumerate(self.sampler.steps(labels, self.settings, numbers)):
            self.advance(self.shares[k] * len(numbers))
            f_hat = step.f_hat
        return drawn_pixels(decode_images(self.sampler.tokenizer, f_hat))

    def draw_tokens(self, labels: Tensor, numbers: list[int]) -> Tensor:
        """Draws tokens (b, l) int64, given labels and numbers; raises InputError if logits are not finite."""
        drawn = []
        for k, step in enumerate(self.sampler.steps(labels, self.settings, numbers)):
            self.advance(self.shares[k] / sum(self.shares) * len(numbers))
            drawn.append(step.tokens)
        require_finite(step.f_hat)
        return torch.cat(drawn, dim=1)

    def stream_images(self, numbers: list[int]) -> Iterator[Tensor]:
        """Yields images (b, 3, H, W) in [0, 1] of the set after each scale."""
        return self.sampler.stream_images(self.conditions(numbers), self.settings, numbers)

    def batches(self, numbers: list[int], batch_size: int) -> Iterator[NumberedImages]:
        """Draws this rank's share of the images with the given numbers."""
        rank, world_size = rank_and_world_size()
        parts = [numbers[begin : begin + batch_size] for begin in range(0, len(numbers), batch_size)]
        for part in parts[rank::world_size]:
            yield part, self.draw(self.conditions(part), part)
