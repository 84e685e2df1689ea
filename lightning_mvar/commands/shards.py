"""`shards`: whether a folder of token shards is whole, what is in it, and what its tokens look like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli.arguments import call
from lightning_mvar.cli.tables import format_value, print_rows, print_table, write_records
from lightning_mvar.data.classes import Classes
from lightning_mvar.data.images.examples import ImageSource, find_by_key
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.data.tokens.shards import MANIFEST, Manifest, chosen_samples
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.data.tokens.statistics import TokenStatistics, count_shard, spread_samples
from lightning_mvar.data.tokens.verify import expectations, find_problems
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import is_remote
from lightning_mvar.sampling.grids import captioned_pair, image_grid, save_image
from lightning_mvar.tokenizer.tokenizer import Tokenizer

DESCRIPTION = (
    "Look at a folder of token shards. `lightning-mvar shards verify DIR` checks every file, `info DIR` prints what is "
    "in it, `decode DIR --tokenizer DIR --out PNG` draws some samples; each has --help."
)
NAMED = 5  # classes at each end of the histogram, and skipped images, that are named
COLUMNS = 8  # of a picture


def verify(folder: str, tokenizer: str | None = None) -> None:
    """Check every shard, and name everything that is wrong, a line each; exit code 1 if anything is.

    Of the folder: that the manifest can be read and lists exactly the shards that are there. Of each shard: size,
    SHA-256, that every pack is whole, types, shapes and ranges of tokens and labels, counts, and that no image is
    there twice, in it or in another.

    Args:
        folder: of token shards; `shards verify DIR` is short for it.
        tokenizer: folder of the tokenizer that the tokens are to be of.
    """
    where = existing(folder)
    fingerprint = None if tokenizer is None else load_tokenizer(tokenizer).fingerprint()
    total = sum(path.stat().st_size for path in where.glob("[!.]*.tar"))
    found = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        for problem in find_problems(where, fingerprint, bar.update):
            found.append(problem)
            tqdm.write(str(problem))
    if found:
        files = len({problem.file for problem in found})
        raise InputError(f"{folder} is damaged: {len(found)} problem(s) in {files} file(s), each named above")
    manifest = Manifest.load(where)
    print(f"{folder} is whole: {manifest.num_samples} samples in {len(manifest.shards)} shards")


def info(folder: str, json: str | None = None) -> None:
    """Print the manifest, how much room the samples take, how many codes each scale uses, and the classes' samples.

    `codebook_usage` is the share of the codes that a scale has at all, `codebook_perplexity` how many equally frequent
    ones would be as hard to guess.

    Args:
        folder: of token shards; `shards info DIR` is short for it.
        json: write all of it, with every class, to this file.
    """
    where = existing(folder)
    manifest = sound_manifest(where)
    statistics = TokenStatistics(manifest)
    with tqdm(total=manifest.num_samples, unit="sample", unit_scale=True, desc="info", leave=False) as bar:
        for shard in manifest.shards:
            count_shard(statistics, where, shard)
            bar.update(shard.samples)
    about = {k: v for k, v in asdict(manifest).items() if k not in ("class_names", "shards")}
    about |= {"num_classes": len(manifest.class_names), "num_shards": len(manifest.shards)}
    about |= room(manifest, where, statistics.schedule.num_tokens)
    print_table([about])
    print()
    scales = statistics.per_scale()
    print_rows([list(scales[0]), *([format_value(value) for value in scale.values()] for scale in scales)])
    print()
    print_classes(manifest.class_names, statistics.classes)
    for message in manifest.skipped[:NAMED]:
        print(f"skipped: {message}")
    if len(manifest.skipped) > NAMED:
        print(f"and {len(manifest.skipped) - NAMED} more; --json FILE has all")
    if json is not None:
        counts = enumerate(zip(manifest.class_names, statistics.classes.tolist(), strict=True))
        histogram = [{"label": label, "name": name, "samples": count} for label, (name, count) in counts]
        write_records([about | {"scales": scales, "classes": histogram, "skipped": manifest.skipped}], json)


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
    """Write a picture of what the tokens of some samples decode to, each beneath the image that it was made of.

    Args:
        folder: of token shards; `shards decode DIR` is short for it.
        tokenizer: folder of the tokenizer that made the tokens.
        out: PNG file for the picture.
        n: samples, spread over the shards.
        images: where the originals are now, if they are no longer where the manifest says.
        labels: the same as for `tokenize`, if it was given there.
        class_names: the same as for `tokenize`, if it was given there.
        seed: chooses the samples.
        device: auto, cpu, cuda or cuda:N.
    """
    if n < 1:
        raise InputError(f"--n must be at least 1, got {n}")
    where, target = existing(folder), choose_device(device)
    manifest = sound_manifest(where)
    if not manifest.num_samples:
        raise InputError(f"there are no samples in {folder} yet: let `lightning-mvar tokenize` finish")
    model = load_tokenizer(tokenizer).to(target)
    if manifest.tokenizer != model.fingerprint():
        raise InputError(
            f"the tokens in {folder} are of tokenizer {manifest.tokenizer}, not of {model.fingerprint()} in "
            f"{tokenizer}: name theirs with --tokenizer"
        )
    chosen = spread_samples(manifest.num_samples, n, seed)
    samples = chosen_samples(manifest, LocalShards(where).fetch, chosen)
    try:
        if images is None and is_remote(manifest.source):  # a manifest may come from anybody: it names paths only
            raise InputError(f"the manifest names {manifest.source!r}, which is no path on this machine")
        source = open_images(images or manifest.source, model.config.shape, "skip", labels, class_names)
        originals = find_originals(manifest, samples.keys, source)
    except InputError as error:
        if images is not None:
            raise
        print(f"without originals: {error}; --images says where they are")
        originals = [None] * len(samples.keys)
    decoded = decode_all(model, samples.tokens, target)
    classes = Classes(manifest.class_names, len(manifest.class_names))
    names = [classes.name(int(label)) for label in samples.labels]
    pairs = [captioned_pair(*part) for part in zip(originals, decoded, names, samples.keys, strict=True)]
    save_image(image_grid(torch.stack(pairs), min(len(pairs), COLUMNS)), out)
    found = sum(original is not None for original in originals)
    print(f"{len(pairs)} samples of {folder} in {out}, {found} of them beneath their originals")


def find_originals(manifest: Manifest, keys: Sequence[str], source: ImageSource) -> list[torch.Tensor | None]:
    """The images (3, H, W) in [0, 1] that samples were made of; None for those that the source no longer has."""
    examples = find_by_key(source, manifest.views, manifest.seed, manifest.flips, keys)
    return [None if example is None or example.image is None else (example.image + 1) / 2 for example in examples]


@torch.inference_mode()
def decode_all(model: Tokenizer, tokens: np.ndarray, device: torch.device) -> list[torch.Tensor]:
    """Images (3, H, W) in [0, 1] of tokens (n, l), one at a time: a few are wanted, and memory may be small."""
    rows = torch.from_numpy(tokens.astype(np.int64)).to(device)
    return [((model.decode(row[None])[0] + 1) / 2).clamp(0, 1).cpu() for row in tqdm(rows, desc="decode", leave=False)]


def room(manifest: Manifest, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Bytes on disk, in all and of a sample, against what the tokens could take at least if all were as likely."""
    files = [shard.path_in(folder) for shard in manifest.shards]
    size = sum(file.stat().st_size for file in files)
    least = num_tokens * math.log2(manifest.vocab_size) / 8
    each = size / max(manifest.num_samples, 1)
    return {
        "num_samples": manifest.num_samples,
        "bytes_on_disk": size,
        "tokens_per_sample": num_tokens,
        "bytes_per_sample": each,
        "bits_per_token": math.log2(manifest.vocab_size),
        "theoretical_bytes_per_sample": least,
        "bytes_over_theoretical": each / least,
    }


def print_classes(class_names: list[str], counts: np.ndarray) -> None:
    """How many samples classes have, with the names of those that have the fewest and the most."""
    classes = Classes(class_names, len(class_names))
    print(f"samples of a class: min {counts.min()}, median {np.median(counts):g}, max {counts.max()}")
    order = np.argsort(counts, kind="stable")
    ends = [("rarest", order[:NAMED])] + [("commonest", order[::-1][:NAMED])] * (len(order) > NAMED)
    for what, labels in ends:
        print(f"{what}: " + ", ".join(f"{classes.name(label)} ({counts[label]})" for label in labels.tolist()))


def sound_manifest(folder: Path) -> Manifest:
    """Raises InputError for a manifest whose values nothing can be counted by."""
    manifest = Manifest.load(folder)
    if None in astuple(expectations(manifest)):
        raise InputError(f"{folder / MANIFEST} is damaged; `lightning-mvar shards verify {folder}` says where")
    return manifest


def existing(folder: str) -> Path:
    """Raises InputError unless it is a folder."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder; name one that `lightning-mvar tokenize` wrote, with a {MANIFEST}")
    return Path(folder)


def main(argv: list[str]) -> None:
    if len(argv) > 2 and not argv[2].startswith("-"):
        argv = [*argv[:2], "--folder", *argv[2:]]
    call({"verify": verify, "info": info, "decode": decode}, argv, description=DESCRIPTION)
