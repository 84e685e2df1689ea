"""`evaluate`: scores of sampled images against real ones."""

from __future__ import annotations

import sys
from inspect import signature
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli.arguments import call
from lightning_mvar.cli.ranks import ranks
from lightning_mvar.cli.tables import Record, print_table, write_records
from lightning_mvar.data.builtin.base import EmbeddedSet, Split
from lightning_mvar.data.builtin.digits import DIGITS
from lightning_mvar.data.images.sources import embedded_in
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.metrics.digits import svm_accuracy
from lightning_mvar.metrics.embedded import EmbeddedClassifier
from lightning_mvar.metrics.frechet import frechet_distance
from lightning_mvar.metrics.image_sets import ImageSet, Pictures, Reconstructions, has_images, open_image_set
from lightning_mvar.metrics.judges import kept_classifier
from lightning_mvar.metrics.reference import load_reference
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Summary, hand_over, num_features, prepare
from lightning_mvar.sampling.draw import draw_set
from lightning_mvar.sampling.readers import Samples, open_samples
from lightning_mvar.scales import Shape
from lightning_mvar.tokenizer.tokenizer import Tokenizer

NEIGHBOURS = 3  # k of precision and recall
FULL_NAMES = {
    "fid": "frechet_distance",
    "sfid": "spatial_frechet_distance",
    "is": "inception_score",
    "precision": "precision",
    "recall": "recall",
}


def evaluate(
    samples: str,
    reference: str,
    ckpt_path: str | None = None,
    per_class: int = 50,
    extractor: nn.Module | None = None,
    floor: str | None = None,
    reconstructions: str | None = None,
    tokenizer: str | None = None,
    statistics: str | None = None,
    cache: str = "outputs/statistics",
    json: str | None = None,
    num_workers: int = 0,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    **drawing: Any,
) -> None:
    """Score samples against real images: Frechet distance, sFID where the extractor has spatial features, precision
    and recall (k = 3), and the inception score where it classifies. Digits and photos are also read by classifiers.

    Scores depend on the extractor and on the number of samples, and are comparable only with scores of the same.

    Args:
        samples: the images to score: an npz (arr_0 uint8 N x H x H x 3) or a folder of PNG files, of any origin. With
            --ckpt_path, those that are missing are drawn to it first, by the published protocol where not said
            otherwise: 50 of each class, guidance 1.5, top_k 900, top_p 0.96.
        reference: the real images: `digits:test`; `photos:test`; a folder of class folders; a folder of token shards,
            decoded by --tokenizer; an npz of images (arr_0); or one of mu and sigma, such as ADM's, made with the same
            extractor.
        ckpt_path: a checkpoint of `fit`, sharded or not, or a folder of `export`, to draw the samples from.
        per_class: with --ckpt_path, samples of each class.
        extractor: InceptionV3 (with --extractor.weights FILE), whose scores compare with published ones, or the class
            path of an nn.Module with num_features, images in [0, 1] -> features; where the reference are digits or
            photos, a small classifier trained on the spot.
        floor: other real images, whose distance to the reference is what a perfect model would get.
        reconstructions: folder of a tokenizer, to score its reconstructions of the reference too.
        tokenizer: folder of the tokenizer that decodes token shards, and of the checkpoint's where it has moved.
        statistics: write what is known of the reference to this npz, to be named as --reference later.
        cache: folder that keeps the statistics of real images, and the classifiers of digits and photos.
        json: write what the table shows to this file.
        num_workers: processes that read image files.
        device: auto, cpu, cuda or cuda:N.
        devices: processes on each machine, each with a GPU of its own where `device` is cuda.
        num_nodes: machines; start the same command on each, by torchrun or Slurm.
        drawing: with --ckpt_path, how to draw the samples.
    """
    embedded = embedded_in(reference)
    check_options(reference, floor, reconstructions, statistics, num_workers)
    if ckpt_path is None:
        refuse_drawing(drawing)
        shape = open_samples(samples).shape
        if embedded is not None:
            open_image_set(reference, shape)
    if extractor is None:
        extractor = kept_classifier(reference, cache)
    if extractor is None:
        raise InputError("--extractor is needed for other images than digits and photos, for instance InceptionV3")
    with ranks(device, devices, num_nodes) as fabric:
        prepare(extractor, fabric.device)
        decoder, rebuilder = (
            None if folder is None else load_tokenizer(folder).to(fabric.device)
            for folder in (tokenizer, reconstructions)
        )
        drawn = None
        if ckpt_path is not None:
            drawn = draw_set(fabric, ckpt_path, samples, per_class=per_class, tokenizer=tokenizer, **drawing)
        images = open_samples(samples)
        if fabric.is_global_zero:
            warn_of_few(len(images), extractor)
        judge = Judge(extractor, images.shape, Path(cache), decoder, num_workers)
        real = judge.reference(reference)
        if statistics is not None and fabric.is_global_zero:
            real.save(Path(statistics), extractor)
        record: Record = images.about | {"samples": samples, "reference": reference} | judge.about()
        record |= {"num_samples": len(images), "height": images.shape[0], "width": images.shape[1]}
        if drawn is not None and drawn.images_per_s is not None:
            record["images_per_s"] = drawn.images_per_s
        record |= judge.score(Pictures(images, num_workers), real, "features of the samples")
        if floor is not None:
            record |= judge.over_floor(record["frechet_distance"], real, floor)
        if rebuilder is not None:
            decoded = Reconstructions(open_image_set(reference, images.shape, decoder, num_workers), rebuilder)
            scores = judge.score(decoded, real, "features of the reconstructions")
            record["reconstruction_frechet_distance"] = scores["frechet_distance"]
        if not fabric.is_global_zero:
            return
        if embedded is not None:
            record |= judge_embedded(images, *embedded, extractor)
            if rebuilder is not None:
                record |= judge_decoded(decoded, *embedded, extractor)
        print_table([record])
        if json is not None:
            write_records([record], json)


def check_options(
    reference: str, floor: str | None, reconstructions: str | None, statistics: str | None, num_workers: int
) -> None:
    """Raise InputError for what can be told before hours of drawing."""
    for source in (reference, floor):
        if source is not None and embedded_in(source) is None and not Path(source).exists():
            raise InputError(f"{source} does not exist")
    if reconstructions is not None and reference.endswith(".npz") and not has_images(Path(reference)):
        raise InputError(f"--reconstructions needs images to reconstruct: {reference} has their statistics alone")
    if statistics is not None and not statistics.endswith(".npz"):
        raise InputError(f"--statistics {statistics} must be NAME.npz")
    if num_workers < 0:
        raise InputError(f"--num_workers must not be negative, got {num_workers}")


def refuse_drawing(drawing: dict[str, Any]) -> None:
    """Raise InputError for options of drawing where nothing is drawn."""
    options = signature(draw_set).parameters
    for name, value in drawing.items():
        if value != options[name].default:
            raise InputError(f"--{name} is for drawing samples: name a --ckpt_path to draw them from")


class Judge:
    """Scores sets of images of one size with one extractor, on all ranks together."""

    def __init__(
        self, extractor: nn.Module, shape: Shape, cache: Path, tokenizer: Tokenizer | None, num_workers: int
    ) -> None:
        self.extractor, self.shape, self.cache = extractor, shape, cache
        self.tokenizer, self.num_workers = tokenizer, num_workers

    def about(self) -> Record:
        """What the scores depend on."""
        return {
            "extractor": type(self.extractor).__name__,
            "extractor_weights": fingerprint(self.extractor),
            "resize": getattr(self.extractor, "resize", "none"),
            "num_features": num_features(self.extractor),
        }

    def reference(self, source: str) -> Summary:
        return load_reference(
            self.extractor,
            source,
            self.shape,
            self.cache,
            tokenizer=self.tokenizer,
            num_workers=self.num_workers,
        )

    def score(self, images: ImageSet, real: Summary, progress: str) -> Record:
        """Every score that the extractor and the reference allow, by its full name."""
        scores = Scores(self.extractor, real, len(images), NEIGHBOURS if len(images) > NEIGHBOURS else 0)
        hand_over(images, scores, progress)
        return {FULL_NAMES[name]: value for name, value in scores.compute().items()}

    def over_floor(self, distance: float, real: Summary, floor: str) -> Record:
        """The distance of other real images to the reference, and how many times as far the samples are."""
        least = frechet_distance(real.statistics, self.reference(floor).statistics)
        return {"floor_frechet_distance": least, "frechet_distance_over_floor": distance / least}


def warn_of_few(count: int, extractor: nn.Module) -> None:
    """Say what it means to have few samples.

    Raises:
        InputError: if there are too few for any score.
    """
    if count < 2:
        raise InputError(f"{count} samples: a distance needs at least 2")
    if count <= num_features(extractor):
        tqdm.write(
            f"warning: {count} samples for {num_features(extractor)} features: their covariance is singular, so that "
            f"the Frechet distance comes out too high; compare it only with that of as many samples (published ones "
            f"are of 50,000)",
            file=sys.stderr,
        )


def judge_embedded(images: Samples, embedded: EmbeddedSet, split: Split, extractor: nn.Module) -> Record:
    """How many samples are taken for what they are meant to be, and how many real images of the reference."""
    samples, record = samples_and_labels(images, embedded), Record()
    if embedded is DIGITS:
        record |= judge_digits(samples)
    if tells_apart(extractor, embedded):
        record["classifier_accuracy_on_reference"] = accuracy(extractor, *real_images(embedded, split))
        if samples is not None:
            record["classifier_accuracy_on_samples"] = accuracy(extractor, *samples)
    return record


def judge_digits(samples: tuple[Tensor, Tensor] | None) -> Record:
    """A support vector machine trained on real digits reads the samples; one trained on the samples reads real ones."""
    train, test = real_images(DIGITS, "train"), real_images(DIGITS, "test")
    record: Record = {"svm_accuracy_on_reference": svm_accuracy(*train, *test)}
    if samples is not None:
        record["svm_accuracy_on_samples"] = svm_accuracy(*train, *samples)
        record["svm_accuracy_trained_on_samples"] = svm_accuracy(*samples, *test)
    return record


def judge_decoded(decoded: Reconstructions, embedded: EmbeddedSet, split: Split, extractor: nn.Module) -> Record:
    """The same of a tokenizer's reconstructions of the reference."""
    pixels = torch.cat([batch.cpu() for batch in decoded.batches(0, len(decoded))])
    labels, record = real_images(embedded, split)[1], Record()
    if embedded is DIGITS:
        record["svm_accuracy_on_reconstructions"] = svm_accuracy(*real_images(DIGITS, "train"), pixels, labels)
    if tells_apart(extractor, embedded):
        record["classifier_accuracy_on_reconstructions"] = accuracy(extractor, pixels, labels)
    return record


def samples_and_labels(images: Samples, embedded: EmbeddedSet) -> tuple[Tensor, Tensor] | None:
    """Samples (n, 3, 32, 32) in [0, 1] and what they are meant to be (n,).

    None where nobody knows that, or a machine could not learn from them.
    """
    found = images.labels(list(embedded.class_names))
    if found is None or len(set(found)) < 2 or not set(found) <= set(range(len(embedded.class_names))):
        return None
    return torch.cat([*Pictures(images).batches(0, len(images))]), torch.tensor(found)


def tells_apart(extractor: nn.Module, embedded: EmbeddedSet) -> TypeGuard[EmbeddedClassifier]:
    """Whether an extractor is a classifier of an embedded set."""
    return isinstance(extractor, EmbeddedClassifier) and extractor.embedded is embedded


def accuracy(classifier: EmbeddedClassifier, pixels: Tensor, labels: Tensor) -> float:
    return float((classifier.cpu().classify(pixels) == labels).float().mean())


def real_images(embedded: EmbeddedSet, split: Split) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) in [0, 1] and labels (n,)."""
    images, labels = embedded.load(split)
    return (images + 1) / 2, labels


def main(argv: list[str]) -> None:
    call(evaluate, argv)
