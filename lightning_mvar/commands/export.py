"""`export`: converts a checkpoint, ours or a published one, to one folder or to published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning_mvar.checkpoints import (
    WhichWeights,
    load_official,
    load_official_tokenizer,
    load_tokenizer,
    load_trained,
    save_folder,
    save_official,
)
from lightning_mvar.checkpoints.card import model_card
from lightning_mvar.checkpoints.folders import CONFIG, read_config
from lightning_mvar.cli.arguments import refuse_overwriting
from lightning_mvar.errors import InputError
from lightning_mvar.io.hub import locate
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.scales import ScaleSchedule, format_shape


def export(
    out: str,
    ckpt_path: str | None = None,
    official: str | None = None,
    tokenizer: str | None = None,
    resolution: int | None = None,
    side_lengths: list[int] | None = None,
    to: Literal["folder", "official"] = "folder",
    weights: WhichWeights = "ema",
    **card: Any,
) -> None:
    """Writes network and tokenizer as one self-contained folder, or in the published format.

    Args:
        out: folder to write; an export that it already holds is replaced.
        ckpt_path: checkpoint of `fit`, sharded or not, of which only the weights are read, or folder of `export`.
        official: instead of --ckpt_path, a published VAR or M-VAR network (.pth, .safetensors, or a known name such as
            `var-d16`), or a checkpoint of the published trainer.
        tokenizer: with --ckpt_path, the tokenizer's folder, if it is no longer at the path recorded in the checkpoint;
            with --official, the published tokenizer's file or name, or a folder; on its own, a published tokenizer to
            convert, or a folder to copy for images of another size.
        resolution: 256, 512 or 1024: image size of a tokenizer without a network (256 by default for a published one),
            or the published schedule for --official weights that do not contain theirs (no lvl_1L).
        side_lengths: instead of --resolution, the side of each token map, as [1,2,3,4].
        to: `folder` for config.json and safetensors; `official` for the two .pth files of the published code, which
            fixes `state_dim`, `head_dim` and others to their defaults here; an error lists all that differ.
        weights: for a checkpoint, `ema` for the averaged weights if it has them, `raw` for the last ones.
        card: contents of the model card, the README.md of a folder with a network; arguments of `model_card`.
    """
    if ckpt_path is not None and official is not None:
        raise InputError("give --ckpt_path or --official, not both")
    refuse_overwriting({"--out": out}, {"--ckpt_path": ckpt_path, "--official": official, "--tokenizer": tokenizer})
    schedule = requested_schedule(resolution, side_lengths)
    if to == "official" or (ckpt_path is None and official is None):
        refuse_card(card)
    if ckpt_path is None and official is None:
        export_tokenizer(out, tokenizer, schedule, to)
        return
    if ckpt_path is not None:
        if schedule is not None:
            raise InputError("--resolution and --side_lengths are for published weights: others have their schedule")
        model = load_trained(ckpt_path, tokenizer, weights)
    else:
        file, default_tokenizer = locate(str(official))
        model = load_official(file, tokenizer or default_tokenizer, schedule)
    with lock_folder(Path(out), "export"):
        if to == "official":
            print("written:", *save_official(out, model))
            return
        refuse_tokenizer(Path(out))
        readme = model_card(model, **card)
        save_folder(out, model.tokenizer, model.network, model.class_names)
        readme.save(Path(out) / "README.md")
    parameters = sum(p.numel() for p in model.network.parameters()) / 1e6
    print(f"network ({parameters:,.1f}M parameters, depth {model.network.config.depth}) and tokenizer in {out}")


def refuse_tokenizer(folder: Path) -> None:
    """Raises InputError if a folder holds a tokenizer without a network, which shards and checkpoints may refer to."""
    if (folder / CONFIG).is_file() and read_config(folder, "tokenizer", "").network is None:
        raise InputError(f"{folder} holds a tokenizer, which shards and checkpoints may refer to: name another --out")


def refuse_card(options: dict[str, Any]) -> None:
    """Raises InputError if an option of the model card is given, which only a folder with a network has."""
    for name, value in options.items():
        if value:
            raise InputError(f"--{name} is for the model card, which only a folder with a network has: drop it")


def requested_schedule(resolution: int | None, side_lengths: list[int] | None) -> ScaleSchedule | None:
    if resolution is not None and side_lengths is not None:
        raise InputError("give --resolution or --side_lengths, not both")
    if side_lengths is not None:
        return ScaleSchedule(tuple(side_lengths))
    return None if resolution is None else ScaleSchedule.for_resolution(resolution)


def export_tokenizer(out: str, tokenizer: str | None, schedule: ScaleSchedule | None, to: str) -> None:
    """Converts a published tokenizer, or copies one from a folder with another schedule, without a network."""
    if tokenizer is None:
        raise InputError("give --ckpt_path CKPT, --official FILE, or the file of a published tokenizer as --tokenizer")
    if to == "official":
        raise InputError(f"--tokenizer {tokenizer} is a published file already, or has no network to go with it")
    path = locate(tokenizer).path
    if not path.is_dir():
        converted = load_official_tokenizer(path, schedule or ScaleSchedule.for_resolution(256))
    elif schedule is None:
        raise InputError(f"--tokenizer {tokenizer} is a folder already: add --side_lengths to copy it with others")
    else:
        converted = load_tokenizer(path).with_schedule(schedule)
    with lock_folder(Path(out), "export"):
        save_folder(out, converted)
    print(f"tokenizer for images of {format_shape(converted.config.shape)} in {out}")
