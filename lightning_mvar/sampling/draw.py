"""Drawing of image sets from a checkpoint, on any number of devices; shared by `sample` and `evaluate`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mvar.checkpoints import TrainedModel, open_trained
from lightning_mvar.data.classes import Classes, select_classes
from lightning_mvar.data.images.names import is_image
from lightning_mvar.data.tokens.manifest import sampling_settings
from lightning_mvar.devices import (
    Precision,
    device_of,
    exact_float32,
    is_first_rank,
    object_from_rank_zero,
    rank_and_world_size,
    wait_for_ranks,
)
from lightning_mvar.errors import FOREIGN_MODULE_ERRORS, InputError, require_in
from lightning_mvar.io.files import path_component
from lightning_mvar.io.fingerprint import fingerprint, fingerprint_of
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.sampling.drafts import Drafts
from lightning_mvar.sampling.generate import check_arguments
from lightning_mvar.sampling.progress import DrawingBar
from lightning_mvar.sampling.sampler import Drawing, NumberedImages, Sampler, label_tensor
from lightning_mvar.sampling.scorer import read_config
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.token_sets import TokenSet
from lightning_mvar.sampling.writers import NpzFile, PixelArray, PngFolder, SampleSet, partial_folder
from lightning_mvar.scales import format_shape

log = logging.getLogger(__name__)

MAX_IMAGES = 10_000_000
# Keys of a set's metadata that say how it was drawn.
METADATA_KEYS = frozenset(
    [field.name for field in fields(SamplingSettings)]
    + ["per_class", "dtype", "classes", "network", "network_tokenizer", "reject", "reject_weights", "keep"]
)


@dataclass
class Rejection:
    """Rejection sampling: draws surplus images and keeps those a classifier is most confident in (as VAR-d30-re).

    Args:
        classifier: in eval mode, on the device to compute on; see `probabilities`.
        keep: share of the images that is kept.
    """

    classifier: nn.Module
    keep: float

    def metadata(self) -> dict[str, Any]:
        """Returns everything that determines which images are kept."""
        name = type(self.classifier).__name__
        return {"reject": name, "reject_weights": fingerprint(self.classifier), "keep": self.keep}

    def batches(self, drawing: Drawing, numbers: list[int], batch_size: int) -> Iterator[NumberedImages]:
        """Draws this rank's share of the classes that contain any of `numbers`; a class is always drawn completely."""
        rank, world_size = rank_and_world_size()
        size = drawing.per_class
        groups = sorted({number // size for number in numbers})
        for group in groups[rank::world_size]:
            yield list(range(group * size, (group + 1) * size)), self.draw_best(drawing, group, batch_size)

    def draw_best(self, drawing: Drawing, group: int, batch_size: int) -> PixelArray:
        """Draws the candidates of one class and returns those kept, in the order of drawing."""
        candidates = math.ceil(drawing.per_class / self.keep)
        label = int(drawing.labels[group * drawing.per_class])
        best: list[tuple[float, int, PixelArray]] = []  # confidence, number, image
        for numbers in torch.arange(group * candidates, (group + 1) * candidates).split(batch_size):
            images = drawing.draw(torch.full_like(numbers, label), numbers.tolist())
            confidences = self.probabilities(images)[:, label].tolist()
            # Copies, because views would keep the complete batch in memory.
            best += zip(confidences, numbers.tolist(), map(np.copy, images), strict=True)
            best = sorted(best, key=lambda image: (-image[0], image[1]))[: drawing.per_class]
        return np.stack([pixels for _, _, pixels in sorted(best, key=lambda image: image[1])])

    @torch.no_grad()
    def probabilities(self, pixels: PixelArray) -> Tensor:
        """Returns the class probabilities (b, classes) of images (b, H, W, 3) uint8.

        They are the softmax of the classifier's output; a feature extractor's output first passes its method `logits`.
        """
        images = torch.from_numpy(pixels).to(device_of(self.classifier)).movedim(-1, 1).float() / 255
        logits = getattr(self.classifier, "logits", nn.Identity())
        with exact_float32():
            return logits(self.classifier(images)).softmax(dim=-1)


def draw_set(
    device: torch.device,
    load: Callable[[], TrainedModel],
    out: str | None,
    tokens: str | None = None,
    classes: str | None = None,
    per_class: int = 1,
    reject: nn.Module | None = None,
    keep: float | None = None,
    batch_size: int = 100,
    precision: Precision = "float32",
    graphs: bool = True,
    **sampling: Any,
) -> Drawing:
    """Draws the missing images of a set, each rank a share; all ranks return once the set is complete.

    Args:
        device: device of this rank.
        load: reads network and tokenizer; called after the options have been checked.
        out: NAME.npz (arr_0 uint8 N x H x W x 3, arr_1 int64 labels), or a folder for CLASS/NUMBER.png; None for tokens
            only.
        tokens: folder for the tokens, as token shards; the images of `out` are then decoded from them.
        classes: comma-separated class names (which may contain commas), WordNet ids or numbers, or "unconditional"; all
            classes if not given. 3:0.7+8:0.3 mixes the embeddings of classes; arr_1 then has the class with the largest
            weight.
        per_class: images per class.
        reject: classifier, images in [0, 1] -> logits of the network's classes (or a feature extractor with
            `logits`): draws more images than requested and keeps those it is most confident in.
        keep: with --reject, the share of the images that is kept, default 0.5. One process draws all images of a
            class, so an interruption loses the classes in progress.
        batch_size: images per batch on each device.
        precision: precision of network and decoder. bfloat16 is faster on GPUs and on CPUs with AMX, tf32 on GPUs; they
            may choose differently between tokens of nearly equal probability, so images differ and may depend on the
            batch size.
        graphs: on CUDA, launch each scale as one CUDA graph; `false` launches each kernel separately.

    Raises:
        InputError: if an argument is out of range, or `out` or `tokens` holds other files or another set.
    """
    require_in("[1, inf)", "--", per_class=per_class, batch_size=batch_size)
    check_count(per_class, 1, keep)  # a first check, before reading the network for its number of classes
    if keep is not None and reject is None:
        raise InputError(
            "--keep is the share of the images that --reject CLASSIFIER keeps: add --reject, or drop --keep"
        )
    settings = SamplingSettings(**sampling)
    if out is not None:
        check_target(Path(out))
    if tokens is not None:
        check_token_options(Path(tokens), settings, reject)
    model = load()
    network, tokenizer, names = model
    num_classes = network.config.num_classes
    chosen = select_classes(classes, Classes(names, num_classes))
    check_count(per_class, len(chosen), keep)
    labels = torch.tensor([max(weights, key=weights.__getitem__) for weights in chosen])
    check_arguments(network, tokenizer, label_tensor(chosen, num_classes), settings)  # before anything is written
    mixes = chosen if any(len(weights) > 1 for weights in chosen) else None
    if tokens is not None and (mixes is not None or num_classes in labels):
        raise InputError("--tokens needs classes: remove mixes and `unconditional` from --classes")
    if reject is not None and mixes is not None:
        raise InputError("--reject needs classes: remove mixes from --classes")
    every = mixes is None and labels.tolist() == list(range(num_classes))
    metadata = settings.metadata() | {"per_class": per_class, "classes": "all" if every else recorded_classes(chosen)}
    metadata |= source_metadata(model, settings, precision)
    if is_first_rank():
        warn_of_other_drafts(settings.choice, metadata)
    sampler = Sampler(model, device, precision, graphs)
    sampler.guide(settings)  # before anything is written
    drawing = Drawing(sampler, labels.repeat_interleave(per_class), per_class, settings, mixes=mixes)
    rejection = None if reject is None else prepare_rejection(reject, 0.5 if keep is None else keep, drawing)
    write_set(drawing, metadata, rejection, out, tokens, batch_size)
    return drawing


def source_metadata(model: TrainedModel, settings: SamplingSettings, precision: Precision) -> dict[str, Any]:
    """Returns the fingerprints of the networks and the precision as metadata.

    Raises:
        InputError: if the scorer or the guiding network cannot be read, or the scorer has another tokenizer.
    """
    metadata = {"network": fingerprint(model.network), "network_tokenizer": model.tokenizer.fingerprint()}
    metadata |= {"dtype": precision}  # the key "precision" belongs to a score
    if (scorer := settings.choice.load_scorer(model.tokenizer.quantizer)) is not None:
        metadata |= {"draft_scorer": fingerprint(scorer)}
    if (guide := settings.guide.needed_network(model.network.config)) is not None:
        metadata |= {"guidance_network": fingerprint_of(open_trained(guide).weights)}
    return metadata


def warn_of_other_drafts(choice: Drafts, metadata: dict[str, Any]) -> None:
    """Warns if the scorer was trained on samples of another network, or drawn with other settings."""
    if choice.needed_scorer is None:
        return
    drawn = sampling_settings(read_config(choice.needed_scorer).drawn) or {}
    names = ("network", "guidance", "top_k", "top_p", "temperature")  # default values may be missing
    pairs = [(name, drawn.get(name, "default"), str(metadata.get(name, "default"))) for name in names]
    if differences := [f"{name} {theirs} instead of {ours}" for name, theirs, ours in pairs if ours != theirs]:
        log.warning(
            "the scorer in %s was trained on samples with %s, so its choices may be worse: train one on samples of "
            "this network with these settings",
            choice.needed_scorer,
            ", ".join(differences),
        )


def write_set(
    drawing: Drawing,
    metadata: dict[str, Any],
    rejection: Rejection | None,
    out: str | None,
    tokens: str | None,
    batch_size: int,
) -> None:
    """Draws the missing tokens, images or both, after checking both targets; see `draw_set`."""
    with ExitStack() as stack:
        token_set, images = None, None
        if tokens is not None:
            if is_first_rank():
                stack.enter_context(lock_folder(Path(tokens), "sample", "--tokens"))
            token_set = TokenSet(Path(tokens), drawing, metadata)
        if out is not None:
            stack.enter_context(lock_target(Path(out)))
            metadata |= {} if rejection is None else rejection.metadata()
            images = open_set(Path(out), metadata, drawing)
        if token_set is not None:
            token_set.fill(batch_size)
        if images is not None:
            if rejection is not None:
                fill(images, drawing, partial(rejection.batches, drawing), batch_size, rejection.keep)
            else:
                fill(images, drawing, drawing.batches if token_set is None else token_set.batches, batch_size)


def check_count(per_class: int, classes: int, keep: float | None) -> None:
    """Raises InputError if a set would have too many images, or rejection would draw too many candidates."""
    require_in("(0, 1]", "--", ", the share of the images that is kept", keep=keep)
    if per_class * classes > MAX_IMAGES:
        raise InputError(f"--per_class {per_class}: a set has at most {MAX_IMAGES:,} images; draw several sets")
    if keep is not None and per_class * classes > MAX_IMAGES * keep:
        raise InputError(f"--keep {keep}: at most {MAX_IMAGES:,} images are drawn to choose from; keep a larger share")


def lock_target(target: Path) -> AbstractContextManager[Any]:
    """Locks the target against other commands, on rank 0 for all ranks; a complete file needs no lock."""
    if not is_first_rank() or target.is_file():
        return nullcontext()
    return lock_folder(partial_folder(target) if target.suffix == ".npz" else target, "sample")


def fill(
    images: SampleSet,
    drawing: Drawing,
    batches: Callable[[list[int], int], Iterator[NumberedImages]],
    batch_size: int,
    keep: float = 1,
) -> None:
    """Completes a set.

    Args:
        images: the set.
        drawing: what to draw.
        batches: `batches(numbers, batch_size)` draws this rank's share of the images with these numbers.
        batch_size: images per batch.
        keep: share of the drawn images that `batches` yields.
    """
    missing = object_from_rank_zero(images.missing() if is_first_rank() else [])
    begin = time.perf_counter()
    # Only rank 0 shows progress, assuming that the other ranks are equally fast.
    done, hidden = images.count - len(missing), not is_first_rank()
    with DrawingBar(images.count, done, desc="sample", disable=hidden) as bar:
        ranks = rank_and_world_size()[1]
        drawing.advance = lambda part: bar.advance(part * keep * ranks)
        try:
            for numbers, pixels in batches(missing, batch_size):
                images.write(numbers, pixels)
                bar.complete(len(numbers) * ranks)
        except BaseException:  # an interruption keeps what was drawn
            try:
                images.flush()
            except InputError as error:
                log.error("%s", error)
            raise
        images.flush()
    wait_for_ranks()
    if missing:
        drawing.images_per_s = len(missing) / (time.perf_counter() - begin)
    if is_first_rank():
        images.finish(drawing.labels.numpy())
    wait_for_ranks()


def prepare_rejection(classifier: nn.Module, keep: float, drawing: Drawing) -> Rejection:
    """Moves the classifier to the device; raises InputError unless it has the network's classes."""
    rejection = Rejection(classifier.eval().requires_grad_(False).to(drawing.sampler.device), keep)
    image_shape, num_classes = drawing.sampler.tokenizer.config.shape, drawing.sampler.classes.count
    if (drawing.labels == num_classes).any():
        raise InputError("--reject needs classes: remove `unconditional` from --classes")
    try:
        shape = rejection.probabilities(np.zeros((1, *image_shape, 3), np.uint8)).shape
    except FOREIGN_MODULE_ERRORS as error:
        raise InputError(
            f"--reject {type(classifier).__name__} does not classify images: it raises {type(error).__name__} for one "
            f"of {format_shape(image_shape)}"
        ) from error
    if shape != (1, num_classes):
        raise InputError(
            f"--reject {type(classifier).__name__} returns {tuple(shape)} for one image; a classifier of the network's "
            f"{num_classes} classes returns (1, {num_classes})"
        )
    return rejection


def open_set(target: Path, metadata: dict[str, Any], drawing: Drawing) -> SampleSet:
    """Opens the set of images at `target`, new or unfinished; `metadata` describes how they are drawn."""
    if target.suffix == ".npz":
        return NpzFile(target, metadata, len(drawing.labels), drawing.sampler.tokenizer.config.shape)
    classes = drawing.sampler.classes
    if drawing.mixes is None:
        return PngFolder(target, metadata, [classes.folder(label) for label in drawing.labels.tolist()])
    folders = [
        classes.folder(*weights) if len(weights) == 1 else path_component(classes.describe_weights(weights))
        for weights in drawing.mixes
    ]
    return PngFolder(target, metadata, [folder for folder in folders for _ in range(drawing.per_class)])


def check_target(target: Path) -> None:
    """Raises InputError if images cannot be written to --out, before anything is computed."""
    if is_image(target.name):
        raise InputError(f"--out {target} must be NAME.npz or a folder for PNG files")
    if target.suffix == ".npz" and target.is_dir():
        raise InputError(f"--out {target} is a folder; name a file, or a folder without the suffix .npz")
    if target.suffix != ".npz" and target.is_file():
        raise InputError(f"--out {target} is a file; name a folder, or NAME.npz")


def check_token_options(folder: Path, settings: SamplingSettings, reject: nn.Module | None) -> None:
    """Raises InputError for options that are incompatible with --tokens, before anything is computed."""
    if folder.is_file():
        raise InputError(f"--tokens {folder} is a file; name a folder")
    if settings.smooth:
        raise InputError("--smooth mixes codes, so its images have no tokens: drop --smooth or --tokens")
    if reject is not None:
        raise InputError("--reject selects images, but --tokens keeps all that are drawn: drop --reject or --tokens")


def recorded_classes(chosen: list[dict[int, float]]) -> str:
    """Formats classes and mixes of classes by number for the metadata of a set."""
    return ",".join("+".join(f"{k}:{w}" if len(mix) > 1 else str(k) for k, w in mix.items()) for mix in chosen)
