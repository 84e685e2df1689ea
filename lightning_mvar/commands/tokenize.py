"""`tokenize`: images to token shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.commands.parsing import call
from lightning_mvar.data.images import ImageBatch, ImageSource, OnCorrupt, Views, image_loader, open_images
from lightning_mvar.data.shards import MANIFEST, Manifest, checksum, shard_name, write_shard
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError
from lightning_mvar.tokenizer.tokenizer import Tokenizer

ORDER_SEED = 0  # images go into the shards in one fixed random order, so that every shard has all classes


def tokenize(
    images: str,
    tokenizer: str,
    out: str,
    views: int = 1,
    seed: int = 0,
    shard_size: int = 10_000,
    batch_size: int = 64,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
    device: str = "auto",
) -> None:
    """Turn images into token shards. Started again, it goes on where it stopped.

    Args:
        images: `digits:train`, `photos:test` and the like, or a folder of class folders
            (CLASS/NAME.png|jpg|jpeg|webp).
        tokenizer: folder that `train-tokenizer` or `export` wrote.
        out: folder for the shards and their manifest.
        views: 1 for the centre crop of each image, more for that many random crops of it.
        seed: of the random crops.
        shard_size: samples in a shard.
        batch_size: images encoded at once.
        num_workers: processes that decode images; 0 decodes in the main process.
        on_corrupt: what an image that cannot be decoded does: raise, or be skipped, named and counted.
        device: auto, cpu, cuda or cuda:N.
    """
    if min(views, shard_size, batch_size) < 1 or num_workers < 0:
        raise InputError("--views, --shard_size and --batch_size must be at least 1, --num_workers not negative")
    where, folder = choose_device(device), Path(out)
    if folder.is_file():
        raise InputError(f"--out {folder} is a file; name a folder")
    model = load_tokenizer(tokenizer).to(where)
    source = open_images(images, model.config.resolution, on_corrupt)
    manifest = resume(folder, new_manifest(model, source, images, views, seed, shard_size))
    examples = source if views == 1 else Views(source, views, seed)
    order = np.random.default_rng(ORDER_SEED).permutation(len(examples))
    done = {shard.name for shard in manifest.shards}
    with tqdm(total=len(examples), initial=sum(s.samples for s in manifest.shards), unit="img", desc="tokenize") as bar:
        for index in range(manifest.num_shards):
            name = shard_name(index)
            if name in done:
                continue
            chosen = order[index * shard_size : (index + 1) * shard_size].tolist()
            loader = image_loader(examples, batch_size, num_workers, chosen)
            batches = list(encode(model, loader, where, bar.update))
            tokens, labels, keys, errors = zip(*batches, strict=True)
            shard = write_shard(folder / name, np.concatenate(tokens), np.concatenate(labels), list(chain(*keys)))
            manifest.shards = sorted([*manifest.shards, shard], key=lambda s: s.name)
            manifest.skipped = list(dict.fromkeys([*manifest.skipped, *chain(*errors)]))  # once, whatever the views
            manifest.save(folder)
    report(manifest, folder)


def new_manifest(model: Tokenizer, source: ImageSource, name: str, views: int, seed: int, shard_size: int) -> Manifest:
    return Manifest(
        side_lengths=list(model.config.schedule.side_lengths),
        vocab_size=model.config.vocab_size,
        class_names=source.class_names,
        tokenizer=model.fingerprint(),
        source=name,
        num_images=len(source),
        views=views,
        seed=seed if views > 1 else 0,
        shard_size=shard_size,
    )


def resume(folder: Path, planned: Manifest) -> Manifest:
    """The manifest to go on with: an earlier run's, less the shards that are missing or damaged, or the planned one.

    Raises:
        InputError: if the folder holds shards of something else.
    """
    if not (folder / MANIFEST).is_file():
        return planned
    found = Manifest.load(folder)
    if not found.same_run(planned):
        raise InputError(
            f"{folder} holds shards of other images, another tokenizer, or other --views, --seed or --shard_size: "
            f"choose another --out, or remove that folder"
        )
    found.shards = [
        shard
        for shard in tqdm(found.shards, desc="verify finished shards", leave=False)
        if (folder / shard.name).is_file() and checksum(folder / shard.name) == shard.sha256
    ]
    return found


@torch.inference_mode()
def encode(
    model: Tokenizer, batches: DataLoader[ImageBatch], device: torch.device, advance: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, np.ndarray, list[str], list[str]]]:
    """Tokens (n, l) uint16, labels (n,), keys and error messages of each batch."""
    num_tokens = model.config.schedule.num_tokens
    for batch in batches:
        tokens = np.empty((0, num_tokens), np.uint16)
        if len(batch.images):
            tokens = model.encode(batch.images.to(device)).cpu().numpy().astype(np.uint16)
        for message in batch.errors:
            tqdm.write(f"skipped: {message}")
        advance(len(batch.keys) + len(batch.errors))
        yield tokens, batch.labels.numpy(), batch.keys, batch.errors


def report(manifest: Manifest, folder: Path) -> None:
    skipped = f", {len(manifest.skipped)} images skipped" if manifest.skipped else ""
    print(f"{manifest.num_samples} samples in {len(manifest.shards)} shards in {folder}{skipped}")
    if not manifest.num_samples:
        raise InputError(f"not one image of {manifest.source} could be decoded; the manifest in {folder} names them")


def main(argv: list[str]) -> None:
    call(tokenize, argv)
