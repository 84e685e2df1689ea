"""`likelihood`: how surely a network predicts given images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mvar.checkpoints import TrainedModel, WhichWeights, load_trained
from lightning_mvar.cli.arguments import call
from lightning_mvar.cli.progress import check_reading, read_images
from lightning_mvar.cli.tables import Record, print_table, write_records
from lightning_mvar.data.classes import Classes
from lightning_mvar.data.images.examples import OnCorrupt
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.generate import teacher_inputs


def likelihood(
    ckpt_path: str,
    images: str,
    classes: str | None = None,
    json: str | None = None,
    each: str | None = None,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    batch_size: int = 32,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
    device: str = "auto",
) -> None:
    """Bits that the network takes to tell a token of given images, from what precedes it: means over all tokens, and
    over those of each scale. With v codes, log2(v) would be guessing.

    Args:
        ckpt_path: a checkpoint of `fit`, sharded or not, or a folder of `export`.
        images: `digits:train`, `photos:test` and the like, or a folder of class folders, resized and cropped at the
            centre.
        classes: take all images for this class (a name, number, or "unconditional"); else for that of their folders.
        json: write what the table shows to this file.
        each: write a record for every image to this JSON file.
        tokenizer: folder of the tokenizer, if it is no longer where the checkpoint remembers.
        weights: of a checkpoint, `ema` for those averaged over training where it has them, `raw` for the last.
        batch_size: images at once.
        num_workers: processes that decode image files; 0 decodes in the main process.
        on_corrupt: what an image that cannot be decoded does: raise, or be skipped, named and counted.
        device: auto, cpu, cuda or cuda:N.
    """
    check_reading(batch_size, num_workers)
    where, model = choose_device(device), load_trained(ckpt_path, tokenizer, weights)
    source = open_images(images, model.tokenizer.config.shape, on_corrupt)
    labels = labels_of(model, source.class_names, classes)
    for part in (model.network, model.tokenizer):
        part.to(where)
    keys: list[str] = []
    found = []
    for batch in read_images(source, batch_size, num_workers, "likelihood"):
        found.append(bits_per_scale(model, batch.images.to(where), labels[batch.labels].to(where)).cpu())
        keys += batch.keys
    if not keys:
        raise InputError(f"not one image of {images} could be decoded")
    bits = torch.cat(found)
    about: Record = {"ckpt_path": ckpt_path, "images": images, "classes": classes or "their own"}
    record = about | {"num_images": len(keys)} | described(model, bits.mean(dim=0))
    print_table([record])
    if json is not None:
        write_records([record], json)
    if each is not None:
        write_records([{"image": key} | described(model, row) for key, row in zip(keys, bits, strict=True)], each)


@torch.no_grad()
def bits_per_scale(model: TrainedModel, images: Tensor, labels: Tensor) -> Tensor:
    """Images (b, 3, H, W) in [-1, 1], labels (b,) -> (b, k) mean bits of a token of each scale."""
    tokens = model.tokenizer.encode(images)
    inputs = teacher_inputs(model.network.config, model.tokenizer, tokens)
    losses, _ = model.network(labels, inputs, tokens)
    parts = losses.double().split(model.network.config.schedule.lengths, dim=1)
    return torch.stack([part.mean(dim=1) for part in parts], dim=1) / math.log(2)


def described(model: TrainedModel, bits: Tensor) -> Record:
    """Bits (k,) of a token of each scale, by name; first the mean over all tokens."""
    schedule = model.network.config.schedule
    lengths = torch.tensor(schedule.lengths, dtype=bits.dtype)
    mean = float((bits * lengths).sum() / schedule.num_tokens)
    scales = zip(schedule.names, bits.tolist(), strict=True)
    return {"bits_per_token": mean} | {f"bits_per_token_scale_{name}": value for name, value in scales}


def labels_of(model: TrainedModel, folders: list[str], classes: str | None) -> Tensor:
    """The network's label of each folder.

    Raises:
        InputError: if it does not know one.
    """
    names = Classes(model.class_names, model.network.config.num_classes)
    if classes is not None:
        return torch.full((max(len(folders), 1),), names.label(classes))
    try:
        return torch.tensor([names.label(folder) for folder in folders])
    except InputError as error:
        raise InputError(f"{error}: rename the folder of images, or name one class for all with --classes") from error


def main(argv: list[str]) -> None:
    call(likelihood, argv)
