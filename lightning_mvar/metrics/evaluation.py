"""Evaluation of samples: everything that `evaluate` reports about them, in one pass over their images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_mvar.devices import is_first_rank
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.metrics.accuracy import reconstruction_accuracy, sample_accuracy
from lightning_mvar.metrics.class_distances import ClassLabels, class_distances
from lightning_mvar.metrics.evaluator import FULL_NAMES, Evaluator
from lightning_mvar.metrics.frechet import frechet_distance
from lightning_mvar.metrics.image_sets import Reconstructions, SourceImages
from lightning_mvar.metrics.intervals import METHOD, Uncertainty
from lightning_mvar.metrics.reference import Reference, measure
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Summary, extractor_metadata, feed_shard
from lightning_mvar.sampling.draw import METADATA_KEYS
from lightning_mvar.sampling.readers import Samples
from lightning_mvar.tokenizer.tokenizer import Tokenizer

Record = dict[str, Any]  # flat; the keys include the units


@dataclass(frozen=True)
class Evaluation:
    """Images to score samples against, and what to report in addition to the scores.

    Args:
        real: the real images.
        floor: other real images, whose distance to the first is the score of a perfect model.
        reconstructor: tokenizer whose reconstructions of the real images are scored too.
        worst_classes: number of classes whose Frechet distances are reported, largest first.
        uncertainty: intervals and extrapolation to report.

    Raises:
        InputError: if the real images do not support the other options.
    """

    real: Reference
    floor: Reference | None
    reconstructor: Tokenizer | None
    worst_classes: int
    uncertainty: Uncertainty

    def __post_init__(self) -> None:
        name = self.real.name
        require_in("[0, inf)", "--", worst_classes=self.worst_classes)
        if self.worst_classes and self.real.kind != "images":
            raise InputError(
                f"--worst_classes needs a reference with classes, such as a folder of class folders; {name} has none"
            )
        if self.worst_classes and self.real.on_corrupt == "skip":
            raise InputError("--worst_classes needs every image of the reference: drop --on_corrupt skip")
        if self.floor is not None and self.floor.name == name:
            raise InputError(f"--floor {name} is the reference itself, at distance 0: pass other real images")
        if self.reconstructor is not None and not self.real.has_images:
            raise InputError(f"--reconstructions needs images to reconstruct: {name} has only statistics")

    @property
    def references(self) -> list[Reference]:
        return [self.real] if self.floor is None else [self.real, self.floor]

    def score(self, images: Samples, evaluator: Evaluator, summary: Summary) -> Record:
        """Returns the scores of samples and, if requested, of classes, the floor and reconstructions.

        All ranks share the work. Only rank 0 classifies samples and reconstructions of embedded images.

        Args:
            images: the samples.
            evaluator: evaluator of images of their size.
            summary: the evaluator's summary of the real images.
        """
        labels = class_labels(images, self.real) if self.worst_classes else None
        scores = Scores(
            evaluator.extractor,
            summary,
            len(images),
            keep_features=self.uncertainty.extrapolate or self.uncertainty.interval is not None,
            keep_spatial=self.uncertainty.interval is not None,
        )
        feed_shard(SourceImages(images, evaluator.num_workers), scores, "features of the samples")
        values = scores.compute()
        record: Record = {FULL_NAMES[name]: value for name, value in values.items()}
        record |= self.error_bars(scores, values, known_labels(images))
        if labels is not None:
            record |= self.distances_of_worst_classes(scores, summary, labels)
        if self.floor is not None:
            record |= evaluator.floor_scores(values["fid"], summary, self.floor)
        reconstructed = None
        if self.reconstructor is not None:
            originals = self.real.images(images.shape, evaluator.tokenizer, evaluator.num_workers)
            reconstructed = Reconstructions(originals, self.reconstructor)
            measured = measure(evaluator.extractor, reconstructed, "features of the reconstructions").statistics
            record["reconstruction_frechet_distance"] = frechet_distance(summary.statistics, measured)
        if self.real.embedded is not None and is_first_rank():
            record |= sample_accuracy(images, *self.real.embedded, evaluator.extractor)
            if reconstructed is not None:
                record |= reconstruction_accuracy(reconstructed, *self.real.embedded, evaluator.extractor)
        return record

    def error_bars(self, scores: Scores, values: dict[str, float], labels: list[int] | None) -> Record:
        """Returns the extrapolated distance and the intervals around the scores' `values`, if requested."""
        record: Record = {}
        if self.uncertainty.extrapolate:
            record["frechet_distance_extrapolated"] = scores.extrapolated()
        if (level := self.uncertainty.interval) is not None:
            record |= {"interval": level, "interval_method": METHOD}
            for name, (low, high) in scores.intervals(values, level, labels).items():
                record |= {f"{FULL_NAMES[name]}_low": low, f"{FULL_NAMES[name]}_high": high}
        return record

    def distances_of_worst_classes(self, scores: Scores, summary: Summary, labels: ClassLabels) -> Record:
        """Returns the largest Frechet distances of single classes, from the features kept by `scores`."""
        real, generated = summary.features, scores.kept_features()
        assert real is not None
        kept = replace(labels, generated=labels.generated[scores.features.in_bank])
        distances = class_distances(real.to(generated.device), generated, kept)
        return {f"frechet_distance_of_{name}": distances[name] for name in [*distances][: self.worst_classes]}


def describe(images: Samples, extractor: nn.Module) -> Record:
    """Returns what scores depend on: how the samples were drawn, their number, size and classes, and the extractor."""
    # Other metadata might be mistaken for scores.
    record: Record = {name: value for name, value in images.metadata.items() if name in METADATA_KEYS}
    record |= extractor_metadata(extractor)
    record |= {"num_samples": len(images), "height": images.shape[0], "width": images.shape[1]}
    return record | {"file_format": images.file_format} | class_counts(images)


def class_counts(images: Samples) -> Record:
    """Returns the number of classes and the smallest and largest number of images per class; empty if unknown."""
    labels = known_labels(images)
    if labels is None:
        return {}
    counts = Counter(labels).values()
    return {"sampled_classes": len(counts), "fewest_per_class": min(counts), "most_per_class": max(counts)}


def class_labels(images: Samples, real: Reference) -> ClassLabels:
    """Returns the labels of samples and reference; raises InputError unless the samples' classes are known."""
    labels, names = real.feature_labels(images.shape)
    sampled = images.labels(names)
    if sampled is None:
        raise InputError(
            f"--worst_classes needs samples of known classes, in folders named like those of {real.name} or with "
            f"labels in arr_1"
        )
    if not 0 <= min(sampled) <= max(sampled) < len(names):
        raise InputError(
            f"--worst_classes needs samples of the {len(names)} classes of {real.name}: arr_1 has classes from "
            f"{min(sampled)} to {max(sampled)}"
        )
    return ClassLabels(labels, torch.tensor(sampled), names)


def known_labels(images: Samples) -> list[int] | None:
    """Returns the class of each image; None if unknown, as in a single folder, where classes may be mixed."""
    return None if len(images.class_names) == 1 else images.labels(images.class_names)
