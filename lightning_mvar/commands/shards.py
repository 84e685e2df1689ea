"""`shards`: verifies, summarizes and decodes a folder of token shards."""

from __future__ import annotations

import math
import os.path
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli.arguments import refuse_overwriting, require_suffix
from lightning_mvar.cli.tables import format_value, print_rows, print_table
from lightning_mvar.data.classes import Classes
from lightning_mvar.data.images.examples import ImageSource, find_by_key
from lightning_mvar.data.images.files import scan
from lightning_mvar.data.images.sources import open_images, split_off
from lightning_mvar.data.tokens.manifest import MANIFEST, SAMPLED, WRITERS, Manifest
from lightning_mvar.data.tokens.shards import read_samples, read_shard
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.statistics import TokenStatistics, stratified_ids
from lightning_mvar.data.tokens.verify import counted, find_problems
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.fetch import is_remote
from lightning_mvar.io.json_files import write_json
from lightning_mvar.sampling.grids import captioned_pair, image_grid, save_image
from lightning_mvar.tokenizer.tokenizer import Tokenizer

MAX_OTHER_FILES = 10_000  # entries in the folder of the source that are not images, such as class folders
WILDCARDS = frozenset("*?[")
MAX_LISTED = 5  # skipped images, and classes at each end of the histogram
COLUMNS = 8  # in the picture


def verify(folder: str, tokenizer: str | None = None) -> None:
    """Checks every shard and prints each problem on its own line; exits with 1 if there is one.

    The manifest must be readable and list exactly the existing shards. Every shard must have the listed size, SHA-256
    and number of samples, and only complete packs, with tokens and labels of the right types, shapes and ranges. No
    image may occur twice, in one shard or in two.

    Args:
        folder: folder of token shards; `shards verify DIR` is short for `shards verify --folder DIR`.
        tokenizer: folder of the tokenizer that should have made the tokens.
    """
    path = require_folder(folder)
    fingerprint = None if tokenizer is None else load_tokenizer(tokenizer).fingerprint()
    total = sum(file.stat().st_size for file in path.glob("[!.]*.tar"))
    problems = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        for problem in find_problems(path, fingerprint, bar.update):
            problems.append(problem)
            tqdm.write(str(problem))
    if problems:
        counts = (
            f"{counted(len(problems), 'problem')} in {counted(len({problem.file for problem in problems}), 'file')}"
        )
        raise InputError(f"{folder} is damaged: {counts}, listed above")
    manifest = Manifest.load(path)
    counts = f"{counted(manifest.num_samples, 'sample')} in {counted(len(manifest.shards), 'shard')}"
    print(f"{folder} is intact: {counts}")


def info(folder: str, json: str | None = None) -> None:
    """Prints the manifest, the size on disk, the codebook usage per scale and the number of samples per class.

    `codebook_usage` is the fraction of the codes that a scale uses; `codebook_perplexity` is the number of equally
    frequent codes with the same entropy.

    Args:
        folder: folder of token shards; `shards info DIR` is short for `shards info --folder DIR`.
        json: write everything, with every class, to this JSON file.
    """
    refuse_overwriting({"--json": json}, {"--folder": folder})
    path = require_folder(folder)
    manifest = load_valid_manifest(path)
    statistics = TokenStatistics(manifest)
    with tqdm(total=manifest.num_samples, unit="sample", unit_scale=True, desc="info", leave=False) as bar:
        for shard in manifest.shards:
            for pack in read_shard(LocalShards(path).fetch(shard), shard, manifest.spec):
                statistics.update(pack)
            bar.update(shard.samples)
    summary = {k: v for k, v in asdict(manifest).items() if k not in ("class_names", "shards")}
    if manifest.sampling is not None:
        summary["source"] = SAMPLED.rstrip(": ")
        summary |= {f"sampling_{name}": value for name, value in manifest.sampling.items()}
    summary |= {"num_classes": len(manifest.class_names), "num_shards": len(manifest.shards)}
    summary |= storage_summary(manifest, path, statistics.schedule.num_tokens)
    print_table([summary])
    print()
    scales = statistics.per_scale()
    print_rows([list(scales[0]), *([format_value(value) for value in scale.values()] for scale in scales)])
    print()
    print_classes(manifest.class_names, statistics.classes)
    for message in manifest.skipped[:MAX_LISTED]:
        print(f"skipped: {message}")
    if len(manifest.skipped) > MAX_LISTED:
        print(f"and {len(manifest.skipped) - MAX_LISTED} more; --json FILE lists all of them")
    if json is not None:
        counts = enumerate(zip(manifest.class_names, statistics.classes.tolist(), strict=True))
        histogram = [{"label": label, "name": name, "samples": count} for label, (name, count) in counts]
        write_json(json, [summary | {"scales": scales, "classes": histogram, "skipped": manifest.skipped}])


def decode(
    folder: str,
    tokenizer: str,
    out: str,
    n: int = 16,
    images: str | None = None,
    labels: str | None = None,
    class_names: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Decodes some samples into a picture, each below its original image.

    Args:
        folder: folder of token shards; `shards decode DIR` is short for `shards decode --folder DIR`.
        tokenizer: folder of the tokenizer that made the tokens.
        out: PNG file for the picture.
        n: number of samples, spread over the shards.
        images: location of the original images, if they have moved since `tokenize`.
        labels: the value that was passed to `tokenize`, if any.
        class_names: the value that was passed to `tokenize`, if any.
        seed: seed that chooses the samples.
        device: auto, cpu, cuda or cuda:N.
    """
    require_in("[1, inf)", "--", n=n)
    require_in("[0, inf)", "--", seed=seed)
    refuse_overwriting({"--out": out}, {"--folder": folder, "--tokenizer": tokenizer, "--images": images})
    require_suffix((".png",), {"--out": out})
    path, torch_device = require_folder(folder), choose_device(device)
    manifest = load_valid_manifest(path)
    if not manifest.num_samples:
        raise InputError(f"there are no samples in {folder} yet: let {manifest.command} finish")
    model = load_tokenizer(tokenizer).to(torch_device)
    manifest.check_tokenizer(folder, model.fingerprint())
    ids = stratified_ids(manifest.num_samples, n, seed)
    samples = read_samples(manifest, LocalShards(path).fetch, ids)
    originals: list[torch.Tensor | None] = [None] * len(samples.keys)
    try:
        if images is None:
            check_source(manifest)
        if images is not None or manifest.sampling is None:  # a network's samples have no originals
            source = open_images(
                images or manifest.source, model.config.shape, "skip", labels, class_names, margin=manifest.margin
            )
            originals = find_originals(manifest, samples.keys, source)
    except InputError as error:
        if images is not None:
            raise
        print(f"without originals: {error}; pass their location as --images")
    decoded = decode_all(model, samples.tokens, torch_device)
    classes = Classes(manifest.class_names, len(manifest.class_names))
    names = [classes.name(int(label)) for label in samples.labels]
    pairs = [captioned_pair(*pair) for pair in zip(originals, decoded, names, samples.keys, strict=True)]
    save_image(image_grid(torch.stack(pairs), min(len(pairs), COLUMNS)), out)
    num_originals = sum(original is not None for original in originals)
    print(f"{counted(len(pairs), 'sample')} of {folder} in {out}, {num_originals} of them below their originals")


def check_source(manifest: Manifest) -> None:
    """Checks that the source in a manifest, which may come from elsewhere, can be opened safely and quickly.

    Raises:
        InputError: if it is not a path on this machine, has wildcards, or is a folder with far more files than images.
    """
    source, max_entries = manifest.source, 2 * manifest.num_images + MAX_OTHER_FILES
    folder, _ = split_off(source)
    if is_remote(source) or not source.isprintable():
        raise InputError(f"the manifest names {source!r}, which is not a path on this machine")
    if not os.path.isdir(folder) and not WILDCARDS.isdisjoint(source):
        raise InputError(f"the manifest names {source!r:.200}, which has wildcards")
    if os.path.isdir(folder) and (os.path.realpath(folder) == os.sep or holds_more(Path(folder), max_entries)):
        raise InputError(f"the manifest names {source!r:.200}, which has far more files than the shards have images")


def holds_more(folder: Path, max_entries: int) -> bool:
    """Returns whether there are more than `max_entries` files and folders below a folder, without following links."""
    count, pending = 0, [folder]
    while pending and count <= max_entries:
        entries = scan(pending.pop())
        count += len(entries)
        pending += [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return count > max_entries


def find_originals(manifest: Manifest, keys: Sequence[str], source: ImageSource) -> list[torch.Tensor | None]:
    """Returns the source image (3, H, W) in [0, 1] of each key; None if the source no longer has it."""
    examples = find_by_key(source, manifest.views, manifest.seed, manifest.flips, keys)
    return [None if example is None or example.image is None else (example.image + 1) / 2 for example in examples]


@torch.inference_mode()
def decode_all(model: Tokenizer, tokens: np.ndarray, device: torch.device) -> list[torch.Tensor]:
    """Decodes tokens (n, l) to images (3, H, W) in [0, 1], one at a time to save memory."""
    rows = torch.from_numpy(tokens.astype(np.int64)).to(device)
    return [((model.decode(row[None])[0] + 1) / 2).clamp(0, 1).cpu() for row in tqdm(rows, desc="decode", leave=False)]


def storage_summary(manifest: Manifest, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Returns bytes on disk, in total and per sample, and their ratio to the minimum for uniform tokens."""
    files = [shard.path_in(folder) for shard in manifest.shards]
    size = sum(file.stat().st_size for file in files)
    minimum = num_tokens * math.log2(manifest.vocab_size) / 8
    per_sample = size / max(manifest.num_samples, 1)
    return {
        "num_samples": manifest.num_samples,
        "bytes_on_disk": size,
        "tokens_per_sample": num_tokens,
        "bytes_per_sample": per_sample,
        "bits_per_token": math.log2(manifest.vocab_size),
        "theoretical_bytes_per_sample": minimum,
        "bytes_over_theoretical": per_sample / minimum,
    }


def print_classes(class_names: list[str], counts: np.ndarray) -> None:
    """Prints the range of samples per class, and the classes with the fewest and the most samples."""
    classes = Classes(class_names, len(class_names))
    print(f"samples per class: min {counts.min()}, median {np.median(counts):g}, max {counts.max()}")
    order = np.argsort(counts, kind="stable")
    ends = [("rarest", order[:MAX_LISTED])] + [("most common", order[::-1][:MAX_LISTED])] * (len(order) > MAX_LISTED)
    for title, labels in ends:
        print(f"{title}: " + ", ".join(f"{classes.name(label)} ({counts[label]})" for label in labels.tolist()))


def load_valid_manifest(folder: Path) -> Manifest:
    """Loads a manifest, finished or not; raises InputError if a value is invalid."""
    manifest = Manifest.load(folder)
    for message, remedy in manifest.invalid_values():
        raise InputError(f"{folder / MANIFEST} is damaged: {message}; {remedy}")
    return manifest


def require_folder(folder: str) -> Path:
    """Returns the folder's path; raises InputError if it is not a folder."""
    if not os.path.isdir(folder):  # False for a name that is too long
        raise InputError(f"{folder:.200} is not a folder; name one that {WRITERS} wrote, with a {MANIFEST}")
    return Path(folder)


shards = {"verify": verify, "info": info, "decode": decode}
