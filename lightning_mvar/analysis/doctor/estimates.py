"""Estimates of how much each difference between two results contributes to the difference of their distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from io import BytesIO
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.analysis.doctor.differences import FEATURE_FACTORS, Difference, Result, balance, compression
from lightning_mvar.analysis.doctor.traces import read_some, sharpness_of
from lightning_mvar.data.images.decoding import SUFFIXES_BY_FORMAT
from lightning_mvar.data.images.examples import spaced_evenly
from lightning_mvar.data.images.protocols import DEFAULT_RESIZING, Resizing
from lightning_mvar.data.images.sources import find_embedded_set, split_off
from lightning_mvar.devices import device_of, exact_float32
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.frechet import Statistics, frechet_distance, statistics_of
from lightning_mvar.metrics.image_sets import BATCH_SIZE
from lightning_mvar.metrics.reference import open_reference
from lightning_mvar.sampling.readers import FolderSamples, Samples
from lightning_mvar.scales import Shape

Pixels = NDArray[np.uint8]  # of one image (H, W, 3)
Change = Callable[[Pixels], Pixels]
Growth = tuple[str, float] | None  # description of the scored samples, and the increase of their distance
MAX_SAMPLES = 50_000  # in a set that is scored again; bounds the memory for its features
BICUBIC = Image.Resampling.BICUBIC
JPEG = SUFFIXES_BY_FORMAT["JPEG"]


class Estimate(NamedTuple):
    """Effect of one difference on the distance.

    Args:
        factor: name of the difference.
        text: what was measured.
        explains: estimated contribution to the second distance minus the first.
    """

    factor: str
    text: str
    explains: float


class ScoredSet:
    """Samples of a result, with the extractor and the reference that scored them.

    Args:
        name: name of the result in reports.
        result: the result.
        samples: its samples.
        extractor: prepared, on the device to compute on.
        cache: folder for reference statistics.
        max_images: largest number of samples, evenly spaced, to measure the effect of a change on.
    """

    def __init__(
        self, name: str, result: Result, samples: Samples, extractor: nn.Module, cache: Path, max_images: int
    ) -> None:
        self.name, self.result, self.samples = name, result, samples
        self.extractor, self.cache, self.max_images = extractor, cache, max_images

    @cached_property
    def features(self) -> Tensor:
        """Features (n, f) float32 of all samples."""
        return self.extract(range(len(self.samples)), lambda pixels: pixels, f"features of {self.name}")

    @cached_property
    def real(self) -> Statistics:
        return self.reference(self.result["reference"], self.result.get("crop", "var"))

    @cached_property
    def labels(self) -> NDArray[Any] | None:
        """Classes (n,) of the samples: names of folders or numbers in an npz; None if unknown."""
        names = self.samples.class_names
        labels = None if len(names) == 1 else self.samples.labels(names)
        if labels is None:
            return None
        return np.array(names)[labels] if names else np.array(labels)

    @cached_property
    def distance(self) -> float:
        return frechet_distance(self.real, statistics_of(self.features))

    @cached_property
    def by_class(self) -> NDArray[np.int64]:
        """Indices (n,) of the samples sorted by class, so that evenly spaced ones have the set's class proportions."""
        return np.arange(len(self.samples)) if self.labels is None else np.argsort(self.labels, kind="stable")

    def reference(self, name: str, crop: str) -> Statistics:
        """Returns statistics of a reference at this set's image size; `crop` may be none or unknown."""
        resizing = Resizing.parse(crop) or DEFAULT_RESIZING
        reference = open_reference(name, crop=resizing.protocol, margin=resizing.margin)
        return reference.summary(self.extractor, self.samples.shape, self.cache).statistics

    def distance_of(self, indices: NDArray[np.int64]) -> float:
        """Returns the distance of the samples at these indices."""
        return frechet_distance(self.real, statistics_of(self.features[indices]))

    def growth_to(self, indices: NDArray[np.int64]) -> float:
        """Returns the distance of the samples at these indices minus that of all samples."""
        return self.distance_of(indices) - self.distance

    def growth_by(self, change: Change, progress: str) -> float:
        """Returns how much the distance grows if samples are changed, measured on at most `max_images` of them."""
        indices = spaced(self.by_class, self.max_images)
        changed = statistics_of(self.extract(indices.tolist(), change, progress))
        return frechet_distance(self.real, changed) - self.distance_of(indices)

    def extract(self, indices: range | list[int], change: Change, progress: str) -> Tensor:
        """Returns features (n, f) float32, on the CPU, of changed samples."""
        device, batches = device_of(self.extractor), []
        for begin in tqdm(range(0, len(indices), BATCH_SIZE), progress, leave=False):
            pixels = np.stack([change(self.samples.pixels(i)) for i in indices[begin : begin + BATCH_SIZE]])
            images = torch.from_numpy(pixels).to(device).movedim(-1, 1).float() / 255
            with torch.no_grad(), exact_float32():
                batches.append(self.extractor(images).float().cpu())
        return torch.cat(batches)


def spaced(indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Returns `count` of the indices, evenly spaced, or all if there are fewer."""
    return indices[spaced_evenly(len(indices), count)]


def estimate_all(
    differences: list[Difference], first: ScoredSet | None, second: ScoredSet | None, results: tuple[Result, Result]
) -> Iterator[Estimate | str]:
    """Yields an estimate for each difference whose effect can be measured on the available images.

    A sentence that gives the reason replaces an estimate that fails, for example because a reference is damaged. There
    are no estimates if the features differ, because the distances then have different units.

    Args:
        differences: differences between the results.
        first: samples of the first result, None if they are not available.
        second: samples of the second result, None if they are not available.
        results: both results.
    """
    names = [difference.factor for difference in differences]
    if others := FEATURE_FACTORS.intersection(names):
        yield f"no effects are estimated, because the distances have different units: see {', '.join(sorted(others))}"
        return
    directions = ((first, second, results[1], 1), (second, first, results[0], -1))
    for name in names:
        # Only the set with more detail or more samples can be degraded to match the other, not the reverse.
        found = (
            (sign, estimate)
            for estimator in ESTIMATORS.get(name, ())
            for scored, other, result, sign in directions
            if scored is not None and (estimate := estimator(scored, other, result)) is not None
        )
        try:
            for sign, (text, growth) in islice(found, 1):
                yield Estimate(name, text, sign * growth)
        except InputError as error:
            yield f"the effect of {name} is not estimated: {error}"


def with_fewer(scored: ScoredSet, other: ScoredSet | None, result: Result) -> Growth:
    """Scores as many of the samples as the other result has."""
    count, target = len(scored.samples), result["num_samples"]
    if not 2 <= target < count:
        return None
    return f"{target} of the {count} samples of {scored.name}", scored.growth_to(spaced(scored.by_class, target))


def with_more(scored: ScoredSet, other: ScoredSet | None, result: Result) -> Growth:
    """Extrapolates to more samples from all and half of them; the bias of the distance is proportional to 1 / n."""
    count, target = len(scored.samples), result["num_samples"]
    if not 4 <= count < target:
        return None
    slope = scored.growth_to(spaced(scored.by_class, count // 2)) / (1 / (count // 2) - 1 / count)
    return f"{scored.name} extrapolated from {count} to {target} samples", slope * (1 / target - 1 / count)


def with_classes_of(scored: ScoredSet, other: ScoredSet | None, result: Result) -> Growth:
    """Scores samples of a balanced set, chosen in the class proportions of the other set."""
    if other is None or scored.labels is None or other.labels is None or balance(scored.result) != "balanced":
        return None
    if scored.labels.dtype.kind != other.labels.dtype.kind:  # one has names, the other numbers
        return None
    classes = np.unique(scored.labels)
    shares = np.array([(other.labels == label).mean() for label in classes])
    if not shares.any():
        return None
    members = [np.flatnonzero(scored.labels == label) for label in classes]
    total = min(len(rows) / share for rows, share in zip(members, shares, strict=True) if share)
    chosen = [spaced(rows, int(total * share)) for rows, share in zip(members, shares, strict=True)]
    indices = np.concatenate(chosen)
    if len(indices) < 2:
        return None
    growth = scored.growth_to(indices) - scored.growth_to(spaced(scored.by_class, len(indices)))
    return f"{len(indices)} samples of {scored.name} in the proportions of {other.name}", growth


def as_jpeg(scored: ScoredSet, other: ScoredSet | None, result: Result) -> Growth:
    """Scores samples saved as JPEG, with the other set's quantization tables or, failing that, at quality 75."""
    if compression(scored.result) != "none" or "JPEG" not in (compression(result) or ""):
        return None
    files = other.samples.files if other is not None and isinstance(other.samples, FolderSamples) else []
    path = next((path for path in files if path.suffix.lower() in JPEG), None)
    tables = None if path is None else getattr(Image.open(path), "quantization", None)
    options = {"quality": 75} if tables is None else {"qtables": tables}

    def compress(pixels: Pixels) -> Pixels:
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", **options)
        return np.asarray(Image.open(buffer))

    quality = "at quality 75" if tables is None else f"as {path} is"
    return f"{scored.name} saved as JPEG {quality}", scored.growth_by(compress, f"{scored.name} as JPEG")


def resized(scored: ScoredSet, other: ScoredSet | None, result: Result) -> Growth:
    """Scores samples resized and back: to the other result's smaller size, or until they are about as blurred."""
    height, width = scored.samples.shape
    size = (result.get("height", height), result.get("width", width))
    if size == (height, width):
        target = result.get("sharpness", inf)
        if target >= scored.result.get("sharpness", 0):
            return None
        some = read_some(scored.samples)
        sizes = [(round(height * k / 8), round(width * k / 8)) for k in range(2, 8)]
        sharpness = {size: sharpness_of(np.stack([resize_and_back(image, size) for image in some])) for size in sizes}
        size = min(sharpness, key=lambda size: abs(sharpness[size] - target))
    if size[0] > height or size[1] > width:
        return None
    text = f"{scored.name} resized to {size[0]} x {size[1]} and back"
    return text, scored.growth_by(lambda pixels: resize_and_back(pixels, size), text)


def resize_and_back(pixels: Pixels, size: Shape) -> Pixels:
    """Resizes an image (H, W, 3) to (height, width) and back, bicubically."""
    image = Image.fromarray(pixels)
    return np.asarray(image.resize(size[::-1], BICUBIC).resize(image.size, BICUBIC))


def rounded_down(scored: ScoredSet, other: ScoredSet | None, result: Result) -> Growth:
    """Attributes the whole difference to rounding, because the images are otherwise the same."""
    if other is None:
        return None
    return f"{scored.name} and {other.name} are otherwise the same images", other.distance - scored.distance


def against_other_reference(scored: ScoredSet, other: ScoredSet | None, result: Result) -> Growth:
    """Scores the samples against the other result's reference, if it exists on this machine."""
    name = result["reference"]
    if find_embedded_set(name) is None and not Path(split_off(name)[0]).expanduser().exists():
        return None
    real = scored.reference(name, result.get("crop", "var"))
    return f"{scored.name} against {name}", frechet_distance(real, statistics_of(scored.features)) - scored.distance


def with_other_crop(scored: ScoredSet, other: ScoredSet | None, result: Result) -> Growth:
    """Scores the samples against their own reference, cropped as for the other result."""
    name, resizing = scored.result["reference"], Resizing.parse(result["crop"])
    reference = open_reference(name)
    if reference.kind != "images" or reference.embedded is not None or resizing is None:
        return None
    distance = frechet_distance(scored.reference(name, str(resizing)), statistics_of(scored.features))
    return f"{scored.name} with {resizing.settings}", distance - scored.distance


ESTIMATORS: dict[str, tuple[Callable[[ScoredSet, ScoredSet | None, Result], Growth], ...]] = {
    "num_samples": (with_fewer, with_more),
    "balance of classes": (with_classes_of,),
    "compression": (as_jpeg,),
    "image size": (resized,),
    "sharpness": (resized,),
    "rounding": (rounded_down,),
    "reference": (against_other_reference,),
    "crop": (with_other_crop,),
}
