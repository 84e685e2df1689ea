"""What real images look like to a feature extractor: measured once, by all ranks together, and kept in a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.distributed as dist
from torch import nn

from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.io.npz import names_in
from lightning_mvar.metrics.image_sets import ImageSet, has_images, open_image_set
from lightning_mvar.metrics.summary import Features, Summary, hand_over
from lightning_mvar.scales import Shape
from lightning_mvar.tokenizer.tokenizer import Tokenizer

MAX_FEATURES = 10_000  # real images that precision and recall are taken against, as in the published protocol


def load_reference(
    extractor: nn.Module,
    source: str,
    size: int | Shape,
    cache: Path,
    with_features: bool = True,
    tokenizer: Tokenizer | None = None,
    num_workers: int = 0,
) -> Summary:
    """The reference that `source` names, for images of this size.

    Measuring is divided among the ranks, which must all call this; what is measured is kept in the folder `cache`.

    Args:
        extractor: prepared, on the device to compute on.
        source: images, as `open_image_set` takes them, or an npz with their statistics `mu` and `sigma`, such as the
            published ADM / OpenAI files or one that `evaluate --statistics` wrote: the extractor must be the one that
            it was made with. With the images themselves in it (`arr_0`), precision and recall can be computed too.
        size: side of the images in pixels, or their (height, width).
        cache: folder for what is measured.
        with_features: whether precision and recall are wanted.
        tokenizer: that decodes token shards, on the device to decode on.
        num_workers: processes that read image files.

    Raises:
        InputError: if the source does not exist, is damaged, or is not for this extractor.
    """
    path, published = Path(source), None
    if path.suffix == ".npz" and "mu" in names_in(path):
        published = Summary.load(path, extractor)
        if published.features is not None or not with_features or not has_images(path):
            return published
    images = open_image_set(source, size, tokenizer, num_workers)
    measured = kept_or_measured(extractor, images, source, cache)
    return measured if published is None else Summary(published.statistics, published.spatial, measured.features)


def kept_or_measured(extractor: nn.Module, images: ImageSet, name: str, cache: Path) -> Summary:
    identity = f"{name} {images.identity} {images.shape} {fingerprint(extractor)}"
    path = cache / f"{type(extractor).__name__}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if told_by_first_rank(path.is_file()):
        return Summary.load(path, extractor)
    reference = measure(extractor, images, f"features of {name}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        reference.save(path, extractor)
    return reference


def told_by_first_rank(value: bool) -> bool:
    """The same on all ranks, though files may appear between their looks."""
    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def measure(extractor: nn.Module, images: ImageSet, progress: str) -> Summary:
    """Of all images of a set, each rank computing its share.

    Raises:
        InputError: unless there are at least 2.
    """
    if len(images) < 2:
        raise InputError(f"a covariance needs at least 2 images, got {len(images)}")
    features = Features(extractor, len(images), MAX_FEATURES)
    hand_over(images, features, progress)
    found = features.compute()
    return Summary(found.statistics, found.spatial, None if found.features is None else found.features.cpu())
