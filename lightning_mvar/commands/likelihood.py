"""`likelihood`: measures the log-likelihood of given images, in bits per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mvar.checkpoints import TrainedModel, WhichWeights, load_trained
from lightning_mvar.cli.arguments import refuse_overwriting
from lightning_mvar.cli.progress import read_images
from lightning_mvar.cli.tables import Record, print_table
from lightning_mvar.data.classes import Classes
from lightning_mvar.data.images.examples import OnCorrupt
from lightning_mvar.data.images.protocols import MARGIN
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.json_files import write_json
from lightning_mvar.sampling.generate import teacher_inputs


def likelihood(
    ckpt_path: str,
    images: str,
    classes: str | None = None,
    json: str | None = None,
    each: str | None = None,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    margin: float = MARGIN,
    batch_size: int = 32,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
    device: str = "auto",
) -> None:
    """Measures the negative log-likelihood of given images in bits per token, over all tokens and per scale.

    A uniform guess among v codes costs log2(v) bits per token.

    Args:
        ckpt_path: checkpoint of `fit`, folder of `export`, published file, or a known name such as `var-d16`.
        images: an embedded set such as `digits:train` or `photos:test`, or a folder of class folders; images are
            resized and center-cropped.
        classes: class for all images (a name, number or "unconditional"); default: the class of the image's folder.
        json: JSON file for the values of the table.
        each: JSON file for one record per image.
        tokenizer: folder of the tokenizer, if it is no longer at the path recorded in the checkpoint.
        weights: for a checkpoint, `ema` for the averaged weights if it has them, `raw` for the last ones.
        margin: ratio of the resized shorter side of images to the crop, as for `tokenize`.
        batch_size: images per batch.
        num_workers: processes that decode image files; 0 decodes in the main process.
        on_corrupt: `raise` an error for an image that cannot be decoded, or `skip` it with a message.
        device: auto, cpu, cuda or cuda:N.
    """
    require_in("[1, inf)", "--", batch_size=batch_size)
    require_in("[0, inf)", "--", num_workers=num_workers)
    refuse_overwriting(
        {"--json": json, "--each": each}, {"--ckpt_path": ckpt_path, "--images": images, "--tokenizer": tokenizer}
    )
    torch_device, model = choose_device(device), load_trained(ckpt_path, tokenizer, weights)
    source = open_images(images, model.tokenizer.config.shape, on_corrupt, margin=margin)
    labels = folder_labels(model, source.class_names, classes)
    for part in (model.network, model.tokenizer):
        part.to(torch_device)
    keys: list[str] = []
    batches = []
    for batch in read_images(source, batch_size, num_workers, "likelihood"):
        batch_bits = bits_per_scale(model, batch.images.to(torch_device), labels[batch.labels].to(torch_device))
        batches.append(batch_bits.cpu())
        keys += batch.keys
    if not keys:
        raise InputError(f"no image of {images} could be decoded")
    bits = torch.cat(batches)
    source_record: Record = {"ckpt_path": ckpt_path, "images": images, "classes": classes or "their own"}
    record = source_record | {"num_images": len(keys)} | bits_record(model, bits.mean(dim=0))
    print_table([record])
    if json is not None:
        write_json(json, [record])
    if each is not None:
        write_json(each, [{"image": key} | bits_record(model, row) for key, row in zip(keys, bits, strict=True)])


@torch.no_grad()
def bits_per_scale(model: TrainedModel, images: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean bits per token (b, k) float64 in each of k scales of images (b, 3, H, W) in [-1, 1]."""
    tokens = model.tokenizer.encode(images)
    inputs = teacher_inputs(model.network.config, model.tokenizer, tokens)
    losses, _ = model.network.score(labels, inputs, tokens)
    parts = losses.double().split(model.network.config.schedule.lengths, dim=1)
    return torch.stack([part.mean(dim=1) for part in parts], dim=1) / math.log(2)


def bits_record(model: TrainedModel, bits: Tensor) -> Record:
    """Returns a record of the mean bits over all tokens and per scale, given the `bits` per token (k,) of k scales."""
    schedule = model.network.config.schedule
    lengths = torch.tensor(schedule.lengths, dtype=bits.dtype)
    mean = float((bits * lengths).sum() / schedule.num_tokens)
    scales = zip(schedule.names, bits.tolist(), strict=True)
    return {"bits_per_token": mean} | {f"bits_per_token_scale_{name}": value for name, value in scales}


def folder_labels(model: TrainedModel, folders: list[str], classes: str | None) -> Tensor:
    """Returns the network's label for each class folder; raises InputError if the network has no such class."""
    names = Classes(model.class_names, model.network.config.num_classes)
    if classes is not None:
        return torch.full((max(len(folders), 1),), names.label(classes))
    try:
        return torch.tensor([names.label(folder) for folder in folders])
    except InputError as error:
        raise InputError(f"{error}: rename the folder of images, or set one class for all with --classes") from error
