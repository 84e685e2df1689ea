"""`train-scorer`: trains the scorer that chooses among drafts, on real images and on samples of the network."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli.arguments import refuse_overwriting
from lightning_mvar.cli.tables import print_rows
from lightning_mvar.data.images.names import visible
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.sources import open_shards
from lightning_mvar.data.tokens.stream import PairedStream, TokenStream
from lightning_mvar.devices import choose_device
from lightning_mvar.errors import InputError, Interrupted, require_in
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.sampling.scorer import CONFIG, FILES, FORMAT, Scorer, ScorerConfig, save_scorer
from lightning_mvar.tokenizer.quantizer import ResidualQuantizer
from lightning_mvar.tokenizer.tokenizer import Tokenizer
from lightning_mvar.training.scorer import separation, train

MAX_SEED = 2**31 - 1
BLOCK_SIZE = 16_384  # samples in a block that is shuffled


def train_scorer(
    tokenizer: str,
    real: str,
    own: str,
    out: str,
    val: str | None = None,
    own_val: str | None = None,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-3,
    width: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Trains a scorer for `--drafts` to distinguish token pyramids of real images from those drawn by a network.

    Draw the samples with `lightning-mvar sample --tokens`, with the settings of the drafts but another seed. With
    `--val` and `--own_val`, prints the probability per scale that a real pyramid scores higher than a drawn one.

    Args:
        tokenizer: folder of the tokenizer of all shards.
        real: token shards of the training images, local or remote.
        own: token shards of the network's own samples.
        out: folder for the scorer; replaces an earlier scorer.
        val: token shards of other real images, to test the scorer on; needs --own_val.
        own_val: token shards of other samples of the network, to test the scorer on; needs --val.
        steps: optimizer steps.
        batch_size: images per step, half of them real.
        lr: peak learning rate.
        width: channels of the first convolutions.
        seed: seed of the initial weights, the dropout and the order of the data.
        device: auto, cpu, cuda or cuda:N.
    """
    require_in("[1, inf)", "--", steps=steps)
    require_in("(0, inf)", "--", lr=lr)
    require_in(f"[0, {MAX_SEED}]", "--", seed=seed)
    if batch_size < 2 or batch_size % 2:
        raise InputError(f"--batch_size {batch_size} must be even and at least 2, because half of the images are real")
    if (val is None) != (own_val is None):
        raise InputError("--own_val needs --val" if val is None else "--val needs --own_val")
    inputs = {"--tokenizer": tokenizer, "--real": real, "--own": own, "--val": val, "--own_val": own_val}
    refuse_overwriting({"--out": out}, inputs)
    if (folder := Path(out)).is_file():
        raise InputError(f"--out {out} is a file; name a folder")
    target, codes = choose_device(device), load_tokenizer(tokenizer)
    open_all = partial(open_streams, codes)
    batches = PairedStream(*open_all(real, own, batch_size // 2, (seed, seed + 1)))
    batches.verify()
    held_out = None
    if val is not None and own_val is not None:
        held_out = open_all(val, own_val, batch_size, (None, None))
        check_class_count(val, held_out[0].manifest, real, batches.real.manifest)
        PairedStream(*held_out).verify()
    with lock_folder(folder, "train-scorer"):
        refuse_other_files(folder)
        torch.manual_seed(seed)
        scorer, quantizer = new_scorer(codes, batches.own.manifest, width).to(target), codes.quantizer.to(target)
        train_with_progress(scorer, quantizer, batches, steps, lr)
        save_scorer(scorer, folder)
    print(f"scorer in {out}")
    if held_out is not None:
        shares = separation(scorer, quantizer, *held_out).tolist()
        print_rows([["scale", *codes.config.schedule.names], ["told apart", *(f"{share:.3f}" for share in shares)]])


def refuse_other_files(folder: Path) -> None:
    """Raises InputError if a folder holds anything but a scorer, such as an exported network."""
    names = {path.name for path in visible(folder.iterdir())}
    if names == {CONFIG} or names - FILES:
        raise InputError(f"--out {folder} holds files other than a scorer: name an empty or new folder")


def train_with_progress(
    scorer: Scorer, quantizer: ResidualQuantizer, batches: PairedStream, steps: int, lr: float
) -> None:
    """Trains a scorer with a progress bar; see `train`.

    Raises:
        Interrupted: on Ctrl-C, because nothing is saved before the end.
    """
    with tqdm(total=steps, desc="scorer", unit="step") as bar:

        def show(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        try:
            train(scorer, quantizer, batches, steps, lr, show)
        except KeyboardInterrupt as stop:
            message, remedy = "interrupted; no scorer was saved", "run the same command again"
            raise Interrupted(signal.SIGINT, message, remedy) from stop


def new_scorer(tokenizer: Tokenizer, own: Manifest, width: int) -> Scorer:
    """Builds a scorer for the pyramids that `own` describes."""
    config = ScorerConfig(
        format_version=FORMAT.number,
        side_lengths=own.side_lengths,
        code_dim=tokenizer.config.code_dim,
        num_classes=len(own.class_names),
        width=width,
        quantizer=fingerprint(tokenizer.quantizer),
        drawn=own.source,
    )
    return Scorer(config)


def open_streams(
    tokenizer: Tokenizer, real: str, own: str, batch_size: int, seeds: tuple[int | None, int | None]
) -> tuple[TokenStream, TokenStream]:
    """Opens the tokens of real images and of own samples; see `open_stream`.

    Raises:
        InputError: if the two are swapped or from another tokenizer, or their classes differ in name or number.
    """
    streams = [open_stream(tokenizer, place, batch_size, seed) for place, seed in zip((real, own), seeds, strict=True)]
    if streams[0].manifest.sampling is not None:
        raise InputError(f"{real} holds samples, not tokens of images: write those with `lightning-mvar tokenize`")
    if streams[1].manifest.sampling is None:
        raise InputError(
            f"{own} holds tokens of images, not samples: draw some with `lightning-mvar sample --tokens FOLDER`"
        )
    streams[0].manifest.check_classes(real, streams[1].manifest.class_names)
    check_class_count(own, streams[1].manifest, real, streams[0].manifest)
    return streams[0], streams[1]


def check_class_count(location: str, manifest: Manifest, real: str, expected: Manifest) -> None:
    """Raises InputError unless the shards at `location` have as many classes as those of the real images."""
    ours, theirs = len(manifest.class_names), len(expected.class_names)
    if ours != theirs:
        raise InputError(f"{location} has {ours} classes, but {real} has {theirs}: name shards of the same classes")


def open_stream(tokenizer: Tokenizer, location: str, batch_size: int, seed: int | None) -> TokenStream:
    """Opens token shards of a tokenizer, shuffled by `seed`, or in stored order if it is None.

    Raises:
        InputError: if the tokens come from another tokenizer, or are too few for one shuffled batch.
    """
    source = open_shards(location)
    manifest = source.manifest()
    manifest.check_tokenizer(location, tokenizer.fingerprint())
    if seed is not None and manifest.num_samples < batch_size:
        raise InputError(
            f"{location} has {manifest.num_samples} samples, fewer than the {batch_size} of each step: lower "
            f"--batch_size, or give more"
        )
    return TokenStream(source, manifest, batch_size, seed, BLOCK_SIZE, rank=0, world_size=1)
