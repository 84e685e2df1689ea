"""`new`: writes a project for your own pictures, a folder with the configuration of each command."""

from __future__ import annotations

import os.path
import shlex
from pathlib import Path

import torch

from lightning_mvar.data.images.sources import find_embedded_set, open_encoded, refuse_split
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import is_remote
from lightning_mvar.io.files import create_folder
from lightning_mvar.projects.files import command_lines, project_files
from lightning_mvar.projects.pictures import Pictures, inspect_pictures
from lightning_mvar.projects.recipes import CPU, GPU, Plan, check_resolution, make_plan

MAX_NAMED = 5  # broken pictures to name


def new(folder: str, *, images: str, resolution: int | None = None) -> None:
    """Writes a project for your own pictures: a folder with the configuration of each command from train-tokenizer on.

    Inspects the pictures, and chooses model sizes for their number and for this machine (table in docs/own_images.md).
    The pictures stay where they are.

    Args:
        folder: new or empty folder to write.
        images: a folder of pictures or of class folders, or archives as `tokenize` takes them.
        resolution: side of the training images: 32, 64, 128 or 256; default: the largest that the pictures allow, at
            most 64 on a CPU.
    """
    target = Path(folder)
    check_resolution(resolution)
    check_folders(target, images)
    source = images if is_remote(images) else os.path.abspath(images)
    opened = open_encoded(source, None, None)
    pictures = inspect_pictures(opened, images)
    plan = make_plan(pictures, resolution, GPU if torch.cuda.is_available() else CPU)
    files = project_files(plan, source, opened.summary())
    create_folder(target, "choose another folder")
    for name, text in files.items():
        (target / name).write_text(text, encoding="utf-8")
    print(*describe(pictures), *describe_plan(plan), f"in {folder}: {', '.join(files)}. Now run", sep="\n")
    print(f"  cd {shlex.quote(folder)}", *(f"  {line}" for line in command_lines()), sep="\n")


def check_folders(target: Path, images: str) -> None:
    """Raises InputError if the project would replace files or lie among its pictures, or the images need none."""
    if find_embedded_set(images) is not None:
        raise InputError(f"--images {images} is built in: configs/experiment and configs/data train on it")
    refuse_split(images)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty: choose another folder")
    if os.path.isdir(images) and target.resolve().is_relative_to(Path(images).resolve()):
        raise InputError(f"{target} is inside --images {images}, among the pictures: choose a folder outside")


def describe(pictures: Pictures) -> list[str]:
    """Returns lines about the pictures."""
    (width, height), (max_width, max_height) = pictures.sizes.min(axis=0), pictures.sizes.max(axis=0)
    transparent = f"; {pictures.transparent:,} are transparent, and shown on white" if pictures.transparent else ""
    lines = [f"{bounds(width, max_width)} pixels wide, {bounds(height, max_height)} high{transparent}"]
    if pictures.broken:
        named, rest = pictures.broken[:MAX_NAMED], pictures.broken[MAX_NAMED:]
        lines += [*named, *([f"and {len(rest):,} more"] if rest else [])]
        lines.append("all commands skip these")
    return lines


def bounds(least: int, most: int) -> str:
    return f"{least}" if least == most else f"{least} to {most}"


def describe_plan(plan: Plan) -> list[str]:
    """Returns lines about what will be trained."""
    recipe, side = plan.recipe, plan.resolution
    if plan.margin == 1.0:
        ends = f", except the ends of {plan.pictures.oblong:.0%} of the pictures, which are not square"
        margin = f"nothing is cut off{ends if plan.pictures.oblong else ''}"
    else:
        margin = "random square crops of 8/9 of the shorter side"
    is_slow = side > recipe.machine.max_resolution
    slow = [f"{side} pixels are meant for GPUs: on a CPU, each step takes several times as long as one of 64"] * is_slow
    return [
        f"{plan.num_training:,} pictures to train on, {plan.pictures.num_held_out:,} held out for validation",
        f"{side} x {side} pixels, {margin}",
        *slow,
        f"tokenizer: {recipe.vocab_size:,} codes, {recipe.tokenizer_steps:,} steps of {plan.tokenizer_batch} images",
        f"network: depth {recipe.depth}, width {recipe.width}, {plan.num_parameters / 1e6:.1f}M parameters, "
        f"{recipe.steps:,} steps of {plan.batch_size} images",
    ]
