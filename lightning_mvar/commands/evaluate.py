"""`evaluate`: scores sampled images against real ones."""

from __future__ import annotations

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from lightning_mvar.checkpoints import StoredModel, TrainedModel, load_tokenizer, open_trained
from lightning_mvar.checkpoints.training import WhichWeights
from lightning_mvar.cli.arguments import refuse_overwriting
from lightning_mvar.cli.tables import Record, print_table
from lightning_mvar.data.classes import Classes, select_classes
from lightning_mvar.data.images.examples import OnCorrupt
from lightning_mvar.data.images.protocols import MARGIN, CropProtocol
from lightning_mvar.devices import set_tf32, warn
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.json_files import write_json
from lightning_mvar.metrics.accuracy import classifier_for
from lightning_mvar.metrics.classifiers.own_images import ImageClassifier
from lightning_mvar.metrics.evaluation import Evaluation, describe
from lightning_mvar.metrics.evaluator import Evaluator, check_sample_count
from lightning_mvar.metrics.intervals import Uncertainty
from lightning_mvar.metrics.reference import Reference, open_reference
from lightning_mvar.metrics.summary import num_features, prepare, try_extractor
from lightning_mvar.sampling.draw import draw_set
from lightning_mvar.sampling.readers import Samples, open_samples
from lightning_mvar.sampling.sampler import Drawing
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.tokenizer.tokenizer import Tokenizer


def evaluate(
    samples: str,
    reference: str,
    ckpt_path: str | None = None,
    per_class: int = 50,
    extractor: nn.Module | None = None,
    crop: CropProtocol = "var",
    margin: float = MARGIN,
    interval: float | None = None,
    extrapolate: bool = False,
    floor: str | None = None,
    worst_classes: int = 0,
    reconstructions: str | None = None,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    statistics: str | None = None,
    cache: str = "outputs/statistics",
    json: str | None = None,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    **sampling: Any,
) -> None:
    """Scores samples against real images: Frechet distance, MIND, KID, precision and recall (k = 3), density and
    coverage (k = 5), Vendi score, sFID if the extractor has spatial features, and inception score if it has logits.
    Samples of digits and photos are also classified.

    Scores depend on the extractor and on the number of samples; compare them only if both are the same.

    Args:
        samples: the images to score, an npz (arr_0 uint8 N x H x W x 3) or a folder of pictures, from any program.
            With --ckpt_path, missing images are first drawn into it, by default with the published protocol: 50 images
            per class, guidance 1.5, top_k 900, top_p 0.96.
        reference: the real images, such as digits:test, a folder or an npz. In full: `digits:test`; `photos:test`;
            `emoji64:test`; `imagenet256` (64, 128, 512), ADM's file, downloaded on first use; a folder of class
            folders; FOLDER:val for its held-out images; a folder of token shards, decoded by --tokenizer; an npz of
            images (arr_0); or an npz of mu and sigma, made with the same extractor.
        ckpt_path: checkpoint of `fit`, folder of `export`, published file, or a known name such as `var-d16`.
        per_class: with --ckpt_path, samples per class.
        extractor: InceptionV3 or DINOv2, downloaded on first use (or --extractor.weights FILE), whose scores compare
            with published ones; Timm or Transformers, with --extractor.model; ImageClassifier, trained on
            --extractor.images in about a minute; or the class path of an nn.Module with num_features that maps images
            in [0, 1] to features. The default is a small classifier of digits or photos, or one trained on the
            reference's own images, whose scores compare only on the same data.
        crop: how real images in files are resized before the center crop. var: shorter side to --margin times the side
            of the samples, Lanczos. adm: box averaging, then bicubic, as ADM's references. torchvision-bilinear,
            torchvision-bicubic: Resize and CenterCrop. Scores against references with different crops do not compare.
        margin: with --crop var, size before the crop as a multiple of the crop; 1.125 in the papers, 1 keeps square
            images whole. Use that of `tokenize`.
        interval: confidence level of an interval for each score, such as 0.95: how much the score would change with
            other samples of the network, by a jackknife that scores the samples 20 times, each time without another
            twentieth. It covers neither the bias of few samples nor other training seeds.
        extrapolate: also report the Frechet distance extrapolated to infinitely many samples, from random subsets of
            the samples, which must be at least four times as many as the features.
        floor: other real images, whose distance to the reference is the score of a perfect model.
        worst_classes: number of classes whose Frechet distances are reported, largest first; the classes of samples and
            reference must be known.
        reconstructions: folder of a tokenizer whose reconstructions of the reference are also scored.
        tokenizer: folder of the tokenizer that decodes token shards, or the checkpoint's tokenizer if it was moved.
        weights: `ema` for the averaged weights if the checkpoint has them, `raw` for the last weights.
        statistics: write the reference statistics and features to this npz, for later use as --reference.
        cache: folder that caches the statistics of real images and the trained classifiers.
        json: write the scores to this JSON file.
        num_workers: processes that decode image files.
        on_corrupt: `raise` an error for a real image that cannot be decoded, or `skip` it with a warning; also
            --extractor.on_corrupt of ImageClassifier.
        device: auto, cpu, cuda or cuda:N.
        devices: processes per machine, each with its own GPU if `device` is cuda.
        num_nodes: machines; start the same command on each, with torchrun or Slurm.
        sampling: with --ckpt_path, how to draw the samples.
    """
    if statistics is not None and not statistics.endswith(".npz"):
        raise InputError(f"--statistics {statistics} must be NAME.npz")
    require_in("[0, inf)", "--", num_workers=num_workers)
    outputs = {"--statistics": statistics, "--json": json}
    inputs = {"--reference": reference, "--floor": floor, "--reconstructions": reconstructions}
    inputs |= {"--ckpt_path": ckpt_path, "--tokenizer": tokenizer}
    (inputs if ckpt_path is None else outputs)["--samples"] = samples
    refuse_overwriting(outputs, inputs)
    open_real = partial(open_reference, crop=crop, margin=margin, on_corrupt=on_corrupt)
    evaluation = Evaluation(
        real=open_real(reference),
        floor=None if floor is None else open_real(floor),
        reconstructor=None if reconstructions is None else load_tokenizer(reconstructions),
        worst_classes=worst_classes,
        uncertainty=Uncertainty(interval, extrapolate),
    )
    real, references = evaluation.real, evaluation.references
    decodes = any(images.kind == "shards" for images in references)
    decoder = load_tokenizer(tokenizer) if decodes and tokenizer is not None else None
    stored = None if ckpt_path is None else open_trained(ckpt_path, tokenizer, weights)
    if stored is None:
        reject_sampling_options(sampling | {"weights": weights, "per_class": per_class})
        given = open_samples(samples)
        count = len(given)
        if real.embedded is not None:
            real.images(given.shape)
    else:
        classes = Classes(stored.class_names, stored.config.num_classes)
        count = per_class * len(select_classes(sampling.get("classes"), classes))
    if extractor is None:
        extractor = default_extractor(real, cache)
    evaluation.uncertainty.check_count(count, num_features(extractor))
    from lightning_mvar.cli.ranks import launch_ranks  # imports Lightning, which takes seconds

    with launch_ranks(device, devices, num_nodes) as fabric:
        for loaded in (decoder, evaluation.reconstructor):
            if loaded is not None:
                loaded.to(fabric.device)
        prepare(extractor, fabric.device)
        sampled = None
        if stored is None:
            try_extractor(extractor, given.shape)
        else:
            load = partial(read_and_try, extractor, stored, references, decoder)
            sampled = draw_set(fabric.device, load, samples, None, per_class=per_class, **sampling)
        set_tf32(False)  # scores are computed in float32, in whatever precision the samples were drawn
        images = open_samples(samples)
        if sampled is not None:
            require_count(images, len(sampled.labels), samples)
        if fabric.is_global_zero:
            check_sample_count(len(images), extractor)
        evaluator = Evaluator(extractor, images.shape, Path(cache), decoder, num_workers)
        summary = evaluator.summary(real)
        if statistics is not None and fabric.is_global_zero:
            summary.save(Path(statistics), extractor)
        record = {"samples": samples, "reference": reference} | describe(images, extractor) | summary.identity()
        record |= {} if sampled is None else costs(sampled)
        record |= {} if stored is None else {"weights": stored.part}
        record |= evaluation.score(images, evaluator, summary)
        if fabric.is_global_zero:
            print_table([record])
            if json is not None:
                write_json(json, [record])


def default_extractor(reference: Reference, cache: str) -> nn.Module:
    """Returns a classifier of the reference's images: that of digits or photos, or one to be trained on them.

    Raises:
        InputError: if the reference has no images with classes.
    """
    embedded = classifier_for(reference, cache)
    if embedded is not None:
        return embedded
    if reference.kind != "images":
        raise InputError(
            f"--extractor is required for --reference {reference.name}, which has no image files with classes: use "
            f"InceptionV3 or DINOv2, which are downloaded on first use"
        )
    margin = reference.resizing.margin
    classifier = ImageClassifier(reference.name, cache=cache, margin=margin, on_corrupt=reference.on_corrupt)
    warn(
        f"without --extractor, features come from a classifier trained on {reference.name} itself: compare its scores "
        f"only with others against the same images (to train it on other images: --extractor ImageClassifier "
        f"--extractor.images FOLDER)"
    )
    return classifier


def costs(drawn: Drawing) -> Record:
    """Returns the cost of drawing an image and, if any were drawn, the number of images per second."""
    rate = {} if drawn.images_per_s is None else {"images_per_s": drawn.images_per_s}
    return drawn.costs()._asdict() | rate


def read_and_try(
    extractor: nn.Module, stored: StoredModel, references: list[Reference], decoder: Tokenizer | None
) -> TrainedModel:
    """Reads a network and checks, before images are drawn, that references and extractor suit it.

    Raises:
        InputError: if a reference has other classes, another image size or another crop than requested, or the
            extractor fails.
    """
    model = stored.load()
    shape = model.tokenizer.config.shape
    for reference in references:
        reference.check_classes(model.class_names)
        reference.open(extractor, shape, decoder)
    try_extractor(extractor, shape)
    return model


def require_count(images: Samples, count: int, name: str) -> None:
    """Raises InputError unless there are as many images as were drawn."""
    if len(images) != count:
        raise InputError(
            f"{name} holds {len(images)} images, but the set has {count}, numbered 0 to {count - 1}: remove the others"
        )


def reject_sampling_options(options: dict[str, Any]) -> None:
    """Raises InputError for sampling options without a checkpoint to sample from."""
    defaults = {
        name: parameter
        for function in (draw_set, SamplingSettings, evaluate)
        for name, parameter in signature(function).parameters.items()
    }
    for name, value in options.items():
        if value != defaults[name].default:
            raise InputError(f"--{name} applies only to sampling: add the --ckpt_path to sample from, or drop --{name}")
