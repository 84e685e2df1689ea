"""`sample`: images from a checkpoint or an exported folder, as npz or PNG files, with pictures to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_mvar.cli.arguments import call
from lightning_mvar.cli.ranks import ranks
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.draw import Drawing, draw_set
from lightning_mvar.sampling.grids import formation_strip, image_grid, save_animation, save_image, with_row_names
from lightning_mvar.sampling.readers import open_samples

GRID_COLUMNS, STRIP_ROWS = 10, 10
ANIMATIONS = (".gif", ".webp")


def sample(
    ckpt_path: str,
    out: str,
    grid: str | None = None,
    strip: str | None = None,
    animation: str | None = None,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    **drawing: Any,
) -> None:
    """Draw images. The same seed gives the same images, in float32 whatever the batch size and the number of devices.
    They are written as they are drawn: started again after an interruption, the same command draws those that are
    missing.

    Args:
        ckpt_path: a checkpoint of `fit`, sharded or not, or a folder of `export`.
        out: NAME.npz (arr_0 uint8 N x H x W x 3, arr_1 int64 labels), or a folder for CLASS/NUMBER.png.
        grid: PNG file for a picture with a row of up to 10 images for each class.
        strip: PNG file for a picture of one image of each class, up to 10, forming scale by scale.
        animation: GIF or WebP file of the grid forming scale by scale.
        device: auto, cpu, cuda or cuda:N.
        devices: processes on each machine, each with a GPU of its own where `device` is cuda.
        num_nodes: machines; start the same command on each, by torchrun or Slurm.
        drawing: what to draw.
    """
    if animation is not None and Path(animation).suffix not in ANIMATIONS:
        raise InputError(f"--animation {animation} must end in {' or '.join(ANIMATIONS)}")
    if drawing.get("reject") is not None and (strip or animation):
        raise InputError("--strip and --animation show images as they are drawn, before --reject chooses among them")
    with ranks(device, devices, num_nodes) as fabric:
        drawn = draw_set(fabric, ckpt_path, out, **drawing)
        if fabric.is_global_zero:
            print(f"{len(drawn.labels)} images in {out}")
            show(drawn, out, grid, strip, animation)


def show(drawn: Drawing, out: str, grid: str | None, strip: str | None, animation: str | None) -> None:
    """Make the pictures that are asked for."""
    shown = torch.arange(len(drawn.labels)).view(-1, drawn.per_class)[:, :GRID_COLUMNS]
    names = [drawn.classes.name(label) for label in drawn.labels[shown[:, 0]].tolist()]
    if grid is not None:
        images = open_samples(out)
        chosen = np.stack([images.pixels(number) for number in shown.flatten().tolist()])
        rows = image_grid(torch.from_numpy(chosen).movedim(-1, 1) / 255, shown.shape[1])
        save_image(with_row_names(rows, names), grid)
        print(f"grid in {grid}")
    if strip is not None:
        save_image(with_row_names(forming_rows(drawn, shown[:STRIP_ROWS, 0]), names[:STRIP_ROWS]), strip)
        print(f"strip in {strip}")
    if animation is not None:
        numbers = shown[:STRIP_ROWS].flatten().tolist()
        frames = [image_grid(step, shown.shape[1]) for step in drawn.forming(drawn.labels[numbers], numbers)]
        save_animation([with_row_names(frame, names[:STRIP_ROWS]) for frame in frames], animation)
        print(f"animation in {animation}")


def forming_rows(drawn: Drawing, numbers: torch.Tensor) -> torch.Tensor:
    """A picture (3, H, W) with a row for each image: what it is after each scale."""
    return formation_strip(drawn.forming(drawn.labels[numbers], numbers.tolist()))


def main(argv: list[str]) -> None:
    call(sample, argv)
