"""`evaluate`: scores of sampled images against real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.commands.parsing import call
from lightning_mvar.commands.records import Record, print_table, write_records
from lightning_mvar.data.digits import load_digits
from lightning_mvar.data.images import open_images
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.digits import DigitsClassifier, svm_accuracy
from lightning_mvar.metrics.frechet import frechet_distance
from lightning_mvar.metrics.reference import BATCH_SIZE, Reference, load_reference, read_npz, stack
from lightning_mvar.metrics.scores import Scores, prepare

NEIGHBOURS = 3  # k of precision and recall
FULL_NAMES = {"fid": "frechet_distance", "is": "inception_score", "precision": "precision", "recall": "recall"}


def evaluate(
    samples: str,
    reference: str = "digits:test",
    extractor: nn.Module | None = None,
    floor: str | None = None,
    tokenizer: str | None = None,
    cache: str = "outputs/statistics",
    json: str | None = None,
) -> None:
    """Score samples against real images: Frechet distance, precision and recall (k = 3), and the inception score where
    the extractor classifies. Digits are also read by classifiers.

    Scores depend on the extractor and are comparable only with scores in the features of the same one.

    Args:
        samples: npz of `sample`: arr_0 uint8 N x H x W x 3, arr_1 labels.
        reference: the real images: `digits:test`, a folder of class folders, or an npz with mu and sigma, such as
            ADM's, made with the same extractor.
        extractor: InceptionV3 (with --extractor.weights FILE), whose scores compare with published ones, or the class
            path of an nn.Module with num_features, images in [0, 1] -> features; where the reference are digits, a
            small classifier trained on the spot.
        floor: other real images, whose distance to the reference is what a perfect model would get.
        tokenizer: folder of a tokenizer, to score its reconstructions of the reference too.
        cache: folder that keeps the statistics of real images, and the digits classifier.
        json: write what the table shows to this file.
    """
    images, labels = read_samples(Path(samples))
    resolution = images.shape[-1]
    digits = reference.startswith("digits:")
    if extractor is None:
        if not digits:
            raise InputError("--extractor is needed for other images than digits, for instance InceptionV3")
        extractor = DigitsClassifier.kept_in(cache)
    prepare(extractor, torch.device("cpu"))
    real = load_reference(extractor, reference, resolution, Path(cache))
    record: Record = {
        "samples": samples,
        "reference": reference,
        "extractor": type(extractor).__name__,
        "num_samples": len(images),
    }
    record |= score(extractor, real, images, "features of the samples")
    if floor is not None:
        others = load_reference(extractor, floor, resolution, Path(cache))
        record["floor_frechet_distance"] = frechet_distance(real.statistics, others.statistics)
        record["frechet_distance_over_floor"] = record["frechet_distance"] / record["floor_frechet_distance"]
    if digits:
        record |= judge_digits(images, labels)
    if isinstance(extractor, DigitsClassifier):
        record["classifier_accuracy_on_samples"] = float((extractor.classify(images) == labels).float().mean())
    if tokenizer is not None:
        record |= judge_reconstructions(tokenizer, reference, resolution, extractor, real)
    print_table([record])
    if json is not None:
        write_records([record], json)


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, H, W) float32 in [0, 1] and labels (n,) of an npz of samples."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; write it with `lightning-mvar sample --out {path}`")
    arrays = read_npz(path, ["arr_0", "arr_1"])
    pixels, labels = arrays["arr_0"], arrays["arr_1"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) != len(labels):
        raise InputError(f"{path}: arr_0 must be uint8 N x H x W x 3 with N labels in arr_1, got {pixels.shape}")
    if len(pixels) < 2:
        raise InputError(f"{path} holds {len(pixels)} images; a distance needs at least 2")
    return torch.from_numpy(pixels).movedim(-1, 1).float() / 255, torch.from_numpy(labels).long()


def judge_digits(images: Tensor, labels: Tensor) -> Record:
    """A support vector machine trained on real digits reads the samples; one trained on the samples reads real ones."""
    train, test = (real_digits(split) for split in ("train", "test"))
    if len(labels.unique()) < 2:
        raise InputError("the samples are of a single class; digits are judged on two or more")
    return {
        "svm_accuracy_on_reference": svm_accuracy(*train, *test),
        "svm_accuracy_on_samples": svm_accuracy(*train, images, labels),
        "svm_accuracy_trained_on_samples": svm_accuracy(images, labels, *test),
    }


def real_digits(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) in [0, 1] and labels (n,)."""
    images, labels = load_digits(split)
    return (images + 1) / 2, labels


@torch.no_grad()
def judge_reconstructions(
    folder: str, reference: str, resolution: int, extractor: nn.Module, real: Reference
) -> Record:
    """The tokenizer's reconstructions of the reference, by the same scores."""
    tokenizer, source = load_tokenizer(folder), open_images(reference, resolution)
    originals = stack(source, list(range(len(source))))
    batches = tqdm(originals.split(BATCH_SIZE), desc="reconstruct", leave=False)
    decoded = torch.cat([(tokenizer.decode(tokenizer.encode(batch * 2 - 1)) + 1) / 2 for batch in batches])
    found = score(extractor, real, decoded, "features of the reconstructions")
    record: Record = {"reconstruction_frechet_distance": found["frechet_distance"]}
    if reference.startswith("digits:"):
        labels = torch.tensor([source[i].label for i in range(len(source))])
        record["svm_accuracy_on_reconstructions"] = svm_accuracy(*real_digits("train"), decoded, labels)
    return record


def score(extractor: nn.Module, real: Reference, images: Tensor, progress: str) -> Record:
    """Every score of images (n, 3, H, W) in [0, 1] that the extractor and the reference allow, by its full name."""
    scores = Scores(extractor, real, len(images), NEIGHBOURS if len(images) > NEIGHBOURS else 0)
    for numbers in tqdm(torch.arange(len(images)).split(BATCH_SIZE), desc=progress, leave=False):
        scores.update(images[numbers], numbers)
    return {FULL_NAMES[name]: value for name, value in scores.compute().items()}


def main(argv: list[str]) -> None:
    call(evaluate, argv)
