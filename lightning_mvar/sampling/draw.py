"""Drawing a set of images from a checkpoint, on any number of devices: what `sample` and `evaluate` share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.checkpoints import TrainedModel, WhichWeights, load_trained
from lightning_mvar.data.classes import Classes
from lightning_mvar.devices import DTYPES, Precision, device_of
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.sampling.generate import (
    check_arguments,
    compile_steps,
    decoded,
    draw_scales,
    generate,
    image_generators,
)
from lightning_mvar.sampling.grids import to_uint8
from lightning_mvar.sampling.writers import NpzFile, PixelArray, PngFolder, SampleSet

T = TypeVar("T")

MAX_IMAGES = 10_000_000
Batch = tuple[list[int], PixelArray]  # numbers of images, and the images


class Ranks(Protocol):
    """Processes that share the work, one per device, as far as drawing needs them: a launched Fabric has all of it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def global_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def is_global_zero(self) -> bool: ...

    def barrier(self) -> None: ...

    def broadcast(self, obj: T) -> T: ...


@dataclass
class Drawing:
    """A set of images that is drawn: `labels` (n,) has the class of each, `per_class` in a row of every class.

    `images_per_s` is how fast all devices together drew what was missing; None before, or where nothing was.
    """

    model: TrainedModel
    classes: Classes
    labels: Tensor
    per_class: int
    seed: int
    settings: dict[str, Any]
    device: torch.device
    images_per_s: float | None = None

    def draw(self, labels: Tensor, numbers: list[int]) -> PixelArray:
        """Images of labels (b,), from the generators of `numbers`."""
        generators = image_generators(self.seed, numbers)
        network, tokenizer, _ = self.model
        return to_uint8(generate(network, tokenizer, labels.to(self.device), generator=generators, **self.settings))

    def forming(self, labels: Tensor, numbers: list[int]) -> Iterator[Tensor]:
        """The same images (b, 3, H, W) in [0, 1] as they are after each scale."""
        generators = image_generators(self.seed, numbers)
        network, tokenizer, _ = self.model
        steps = draw_scales(network, tokenizer, labels.to(self.device), generator=generators, **self.settings)
        for step in steps:
            yield decoded(tokenizer, step.f_hat)

    def about(self, precision: Precision) -> dict[str, Any]:
        """All that the images depend on, as JSON can hold it."""
        chosen = self.labels[:: self.per_class].tolist()
        return self.settings | {
            "seed": self.seed,
            "per_class": self.per_class,
            "dtype": precision,  # "precision" is a score
            "classes": "all" if chosen == list(range(self.classes.count)) else ",".join(map(str, chosen)),
            "network": fingerprint(self.model.network),
            "network_tokenizer": self.model.tokenizer.fingerprint(),
        }

    def batches(self, numbers: list[int], batch_size: int, rank: int, ranks: int) -> Iterator[Batch]:
        """This rank's share of some images of the set."""
        parts = [numbers[begin : begin + batch_size] for begin in range(0, len(numbers), batch_size)]
        for part in parts[rank::ranks]:
            yield part, self.draw(self.labels[part], part)


@dataclass
class Rejection:
    """Of more images than are wanted, those stay that a classifier is surest of (as VAR-d30-re).

    Args:
        classifier: prepared, on the device to compute on; see `probabilities`.
        keep: share of the images that stay.
    """

    classifier: nn.Module
    keep: float

    def about(self) -> dict[str, Any]:
        """What decides which images stay."""
        name = type(self.classifier).__name__
        return {"reject": name, "reject_weights": fingerprint(self.classifier), "keep": self.keep}

    def batches(self, drawing: Drawing, numbers: list[int], batch_size: int, rank: int, ranks: int) -> Iterator[Batch]:
        """This rank's share of the classes that have some of `numbers`, each class as a whole."""
        size = drawing.per_class
        groups = sorted({number // size for number in numbers})
        for group in groups[rank::ranks]:
            yield list(range(group * size, (group + 1) * size)), self.best(drawing, group, batch_size)

    def best(self, drawing: Drawing, group: int, batch_size: int) -> PixelArray:
        """The images of one class that stay, as they were drawn, one after the other."""
        tries = math.ceil(drawing.per_class / self.keep)
        label = int(drawing.labels[group * drawing.per_class])
        best: list[tuple[float, int, PixelArray]] = []  # how sure the classifier is, the number, the image
        for numbers in torch.arange(group * tries, (group + 1) * tries).split(batch_size):
            images = drawing.draw(torch.full_like(numbers, label), numbers.tolist())
            sure = self.probabilities(images)[:, label].tolist()
            best += zip(sure, numbers.tolist(), map(np.copy, images), strict=True)  # a view would keep its batch
            best = sorted(best, key=lambda one: (-one[0], one[1]))[: drawing.per_class]
        return np.stack([image for _, _, image in sorted(best, key=lambda one: one[1])])

    @torch.no_grad()
    def probabilities(self, pixels: PixelArray) -> Tensor:
        """(b, H, W, 3) -> (b, classes), from the classifier's output or, of a feature extractor, its logits."""
        images = torch.from_numpy(pixels).to(device_of(self.classifier)).movedim(-1, 1).float() / 255
        out = self.classifier(images)
        logits = getattr(self.classifier, "logits", None)
        return (out if logits is None else logits(out)).softmax(dim=-1)


def draw_set(
    fabric: Ranks,
    ckpt_path: str,
    out: str,
    classes: str | None = None,
    per_class: int = 1,
    seed: int = 0,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    reject: nn.Module | None = None,
    keep: float | None = None,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    batch_size: int = 100,
    precision: Precision = "float32",
    compile: bool = False,
) -> Drawing:
    """Draw those images of a set that are missing, each rank its share; all ranks end when all images are there.

    Args:
        fabric: launched.
        ckpt_path: a checkpoint of `fit`, sharded or not, or a folder of `export`.
        out: NAME.npz (arr_0 uint8 N x H x W x 3, arr_1 int64 labels), or a folder for CLASS/NUMBER.png.
        classes: comma-separated class names, WordNet ids or numbers, or "unconditional"; all classes where not given.
        per_class: images of each class.
        seed: of the sampling.
        guidance: classifier-free guidance, 0 for none.
        top_k: draw among the k most likely tokens, 0 for all.
        top_p: then among the fewest whose probability reaches p, 1 for all.
        smooth: mix codes for smoother pictures; never for scores.
        reject: a classifier, images in [0, 1] -> logits of the network's classes (or a feature extractor with
            `logits`): draw more images than are wanted, and keep those that it is surest of.
        keep: with --reject, the share of the images that is kept; a half where not given. A class is drawn as a whole,
            by one process: an interruption costs the classes under way.
        tokenizer: folder of the tokenizer, if it is no longer where the checkpoint remembers.
        weights: of a checkpoint, `ema` for those averaged over training where it has them, `raw` for the last.
        batch_size: images drawn at once on each device.
        precision: of network and decoder. bfloat16 is faster on GPUs and on CPUs with AMX; it may choose otherwise
            between tokens that are nearly as likely, so images differ, and may differ from batch size to batch size.
        compile: make a graph of each scale with torch.compile: minutes at the start, for many images on a GPU.

    Raises:
        InputError: if the checkpoint cannot be read, an argument is out of range, or `out` holds something else.
    """
    if per_class < 1 or batch_size < 1:
        raise InputError("--per_class and --batch_size must be at least 1")
    if keep is not None and reject is None:
        raise InputError("--keep says how many images stay after --reject CLASSIFIER, which is not given")
    target = Path(out)
    check_target(target)
    model = load_trained(ckpt_path, tokenizer, weights)
    names = Classes(model.class_names, model.network.config.num_classes)
    chosen = chosen_labels(classes, names)
    if per_class * len(chosen) > MAX_IMAGES:
        raise InputError(f"--per_class {per_class}: a set has at most {MAX_IMAGES:,} images; draw several")
    labels = torch.tensor(chosen).repeat_interleave(per_class)
    settings: dict[str, Any] = {"guidance": guidance, "top_k": top_k, "top_p": top_p, "smooth": smooth}
    check_arguments(model.network, model.tokenizer, labels, guidance, top_k, top_p, None)  # before anything is written
    drawing = Drawing(model, names, labels, per_class, seed, settings, fabric.device)
    rejection = None if reject is None else prepare_rejection(reject, 0.5 if keep is None else keep, drawing)
    about = drawing.about(precision) | ({} if rejection is None else rejection.about())
    images = open_set(target, about, drawing)
    for part in (model.network, model.tokenizer):
        part.to(fabric.device).lower(DTYPES[precision])
    if compile:
        compile_steps(model.network)
    fill(images, drawing, rejection, fabric, batch_size)
    return drawing


def fill(images: SampleSet, drawing: Drawing, rejection: Rejection | None, fabric: Ranks, batch_size: int) -> None:
    """Draw what is missing of a set, each rank its share, and finish it."""
    missing = fabric.broadcast(images.missing() if fabric.is_global_zero else [])
    begin = time.perf_counter()
    share = (missing, batch_size, fabric.global_rank, fabric.world_size)
    batches = drawing.batches(*share) if rejection is None else rejection.batches(drawing, *share)
    with progress(fabric, images.count, len(missing)) as bar:
        for numbers, pixels in batches:
            images.write(numbers, pixels)
            bar.update(min(len(numbers) * fabric.world_size, images.count - bar.n))
    fabric.barrier()
    if missing:
        drawing.images_per_s = len(missing) / (time.perf_counter() - begin)
    if fabric.is_global_zero:
        images.finish(drawing.labels.numpy())
    fabric.barrier()


def progress(fabric: Ranks, count: int, missing: int) -> tqdm:
    """The first rank's, which takes it that the others are as fast."""
    hidden = not fabric.is_global_zero
    return tqdm(total=count, initial=count - missing, unit="img", desc="sample", disable=hidden)


def prepare_rejection(classifier: nn.Module, keep: float, drawing: Drawing) -> Rejection:
    """Raise InputError unless the classifier knows the classes that are drawn."""
    if not 0 < keep <= 1:
        raise InputError(f"--keep is the share of the images that is kept, in (0, 1]: got {keep}")
    rejection = Rejection(classifier.eval().requires_grad_(False).to(drawing.device), keep)
    shape, known = drawing.model.tokenizer.config.shape, drawing.classes.count
    if (drawing.labels == known).any():
        raise InputError("--reject is for images of a class: unconditional ones have none")
    found = rejection.probabilities(np.zeros((1, *shape, 3), np.uint8)).shape
    if found != (1, known):
        raise InputError(
            f"--reject {type(classifier).__name__} gives {tuple(found)} for an image; a classifier of the network's "
            f"{known} classes gives (1, {known})"
        )
    return rejection


def open_set(target: Path, about: dict[str, Any], drawing: Drawing) -> SampleSet:
    """Where the images go; `about` says how they are drawn."""
    if target.suffix == ".npz":
        return NpzFile(target, about, len(drawing.labels), drawing.model.tokenizer.config.shape)
    return PngFolder(target, about, [drawing.classes.folder(label) for label in drawing.labels.tolist()])


def check_target(target: Path) -> None:
    """Raise InputError for an --out that images cannot go to, before anything is computed."""
    if target.suffix not in ("", ".npz"):
        raise InputError(f"--out {target} must be NAME.npz or a folder for PNG files")
    if target.suffix == ".npz" and target.is_dir():
        raise InputError(f"--out {target} is a folder; name a file, or a folder without that ending")
    if target.suffix == "" and target.is_file():
        raise InputError(f"--out {target} is a file; name a folder, or NAME.npz")


def chosen_labels(classes: str | None, names: Classes) -> list[int]:
    """Labels of comma-separated class names, all where there are none."""
    if classes is None:
        return list(range(names.count))
    try:
        return [names.label(part) for part in classes.split(",")]
    except InputError as error:
        raise InputError(f"--classes: {error}") from error
