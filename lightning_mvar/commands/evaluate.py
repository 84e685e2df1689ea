"""`evaluate`: scores of sampled images against real ones."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.commands.parsing import call
from lightning_mvar.commands.records import Record, print_record, write_records
from lightning_mvar.data.digits import load_digits
from lightning_mvar.data.images import ImageSource, open_images
from lightning_mvar.errors import InputError
from lightning_mvar.metrics.digits import DigitsClassifier, svm_accuracy
from lightning_mvar.metrics.frechet import (
    BATCH_SIZE,
    Statistics,
    frechet_distance,
    image_statistics,
    reference_statistics,
    stack_images,
)

DIGITS_CLASSIFIER = "digits_classifier.safetensors"  # kept among the statistics


def evaluate(
    samples: str,
    reference: str = "digits:test",
    extractor: nn.Module | None = None,
    floor: str | None = None,
    tokenizer: str | None = None,
    cache: str = "outputs/statistics",
    json: str | None = None,
) -> None:
    """Score samples by the Frechet distance to real images; digits are also read by classifiers.

    A distance depends on the extractor and is comparable only with distances in the features of the same one.

    Args:
        samples: npz of `sample`: arr_0 uint8 N x H x W x 3, arr_1 labels.
        reference: the real images: `digits:test`, or a folder of class folders.
        extractor: class path of an nn.Module with num_features, images in [0, 1] -> features; a small classifier
            trained on the spot where the reference are digits.
        floor: other real images, whose distance to the reference is what a perfect model would get.
        tokenizer: folder of a tokenizer, to score its reconstructions of the reference too.
        cache: folder that keeps the statistics of real images, and the digits classifier.
        json: write what the table shows to this file.
    """
    images, labels = read_samples(Path(samples))
    real = open_images(reference, images.shape[-1])
    digits = reference.startswith("digits:")
    if extractor is None:
        if not digits:
            raise InputError("--extractor is needed for other images than digits: name an nn.Module with num_features")
        extractor = DigitsClassifier(str(Path(cache) / DIGITS_CLASSIFIER))
    statistics = reference_statistics(extractor, reference, real, Path(cache))
    distance = frechet_distance(statistics, image_statistics(extractor, images, "features of the samples"))
    record: Record = {
        "samples": samples,
        "reference": reference,
        "extractor": type(extractor).__name__,
        "num_samples": len(images),
        "num_reference": len(real),
        "frechet_distance": distance,
    }
    if floor is not None:
        others = reference_statistics(extractor, floor, open_images(floor, images.shape[-1]), Path(cache))
        record["floor_frechet_distance"] = frechet_distance(statistics, others)
        record["frechet_distance_over_floor"] = distance / record["floor_frechet_distance"]
    if digits:
        record |= judge_digits(images, labels)
    if isinstance(extractor, DigitsClassifier):
        record["classifier_accuracy_on_samples"] = float((extractor.classify(images) == labels).float().mean())
    if tokenizer is not None:
        record |= judge_reconstructions(tokenizer, real, digits, extractor, statistics)
    print_record(record)
    if json is not None:
        write_records([record], json)


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, H, W) float32 in [0, 1] and labels (n,) of an npz of samples."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; write it with `lightning-mvar sample --out {path}`")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels, labels = arrays["arr_0"], arrays["arr_1"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged or not an npz of samples ({error})") from error
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


@torch.inference_mode()
def judge_reconstructions(
    folder: str, real: ImageSource, digits: bool, extractor: nn.Module, statistics: Statistics
) -> Record:
    """The tokenizer's reconstructions of the reference, by the same scores."""
    tokenizer, originals = load_tokenizer(folder), stack_images(real)
    batches = tqdm(originals.split(BATCH_SIZE), desc="reconstruct", leave=False)
    decoded = torch.cat([(tokenizer.decode(tokenizer.encode(batch * 2 - 1)) + 1) / 2 for batch in batches])
    found = image_statistics(extractor, decoded, "features of the reconstructions")
    record: Record = {"reconstruction_frechet_distance": frechet_distance(statistics, found)}
    if digits:
        labels = torch.tensor([real[i].label for i in range(len(real))])
        record["svm_accuracy_on_reconstructions"] = svm_accuracy(*real_digits("train"), decoded, labels)
    return record


def main(argv: list[str]) -> None:
    call(evaluate, argv)
