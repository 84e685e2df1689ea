"""`sample`: draws images (npz or PNG files) or their tokens with a trained network, and figures of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from lightning_mvar.checkpoints import WhichWeights, load_trained
from lightning_mvar.cli.arguments import refuse_overwriting, require_suffix
from lightning_mvar.data.tokens.verify import counted
from lightning_mvar.errors import InputError
from lightning_mvar.sampling.draw import draw_set
from lightning_mvar.sampling.grids import formation_strip, image_grid, save_animation, save_image, with_row_names
from lightning_mvar.sampling.readers import open_samples
from lightning_mvar.sampling.sampler import Drawing

GRID_COLUMNS, STRIP_ROWS = 10, 10


def sample(
    ckpt_path: str,
    out: str | None = None,
    tokens: str | None = None,
    grid: str | None = None,
    strip: str | None = None,
    animation: str | None = None,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    **drawing: Any,
) -> None:
    """Draws images with a trained network. After an interruption, run the same command again to draw the missing ones.

    Image i of a seed has its own random stream, independent of batch size and number of devices. Other batch sizes
    round differently: in float32, a few images then differ by a gray level (docs/devices.md has figures).

    Args:
        ckpt_path: checkpoint of `fit`, folder of `export`, published file, or a known name such as `var-d16`.
        out: NAME.npz (arr_0 uint8 N x H x W x 3, arr_1 int64 labels), or a folder for CLASS/NUMBER.png.
        tokens: folder for the tokens as token shards, to train on; without --out, no image is decoded.
        grid: PNG file for a grid with one row of up to 10 images per class.
        strip: PNG file for a strip of one image per class, up to 10, decoded after each scale.
        animation: GIF or WebP file of the grid decoded after each scale.
        tokenizer: folder, published file or name of the tokenizer, if it is no longer at the path recorded in the
            checkpoint.
        weights: for a checkpoint, `ema` for the averaged weights if it has them, `raw` for the last ones.
        device: auto, cpu, cuda or cuda:N.
        devices: number of processes per machine, each with its own GPU if `device` is cuda.
        num_nodes: number of machines; start the same command on each, with torchrun or Slurm.
        drawing: arguments of `draw_set`.
    """
    if drawing.get("reject") is not None and (strip or animation):
        raise InputError(
            "--strip and --animation show all drawn images, before --reject selects some: drop them or --reject"
        )
    figures = {"--grid": grid, "--strip": strip, "--animation": animation}
    if out is None and tokens is None:
        raise InputError(
            "nothing to write: add --out NAME.npz or FOLDER for images, --tokens FOLDER for tokens, or both"
        )
    if out is None and (option := next((name for name, path in figures.items() if path is not None), None)):
        raise InputError(f"{option} shows images of --out: add --out, or drop {option}")
    refuse_overwriting(
        {"--out": out, "--tokens": tokens, **figures}, {}
    )  # `draw_set` itself refuses a folder of other files
    refuse_overwriting(figures, {"--ckpt_path": ckpt_path, "--tokenizer": tokenizer})
    require_suffix((".png",), {"--grid": grid, "--strip": strip})
    require_suffix((".gif", ".webp"), {"--animation": animation})
    from lightning_mvar.cli.ranks import launch_ranks  # imports Lightning, which takes seconds

    with launch_ranks(device, devices, num_nodes) as fabric:
        load = partial(load_trained, ckpt_path, tokenizer, weights)
        drawn = draw_set(fabric.device, load, out, tokens, **drawing)
        images = counted(len(drawn.labels), "image")
        if fabric.is_global_zero and tokens is not None:
            print(f"tokens of {images} in {tokens}")
        if fabric.is_global_zero and out is not None:
            print(f"{images} in {out}")
            write_figures(drawn, out, grid, strip, animation)


def write_figures(drawn: Drawing, out: str, grid: str | None, strip: str | None, animation: str | None) -> None:
    """Writes the requested figures."""
    shown = torch.arange(len(drawn.labels)).view(-1, drawn.per_class)[:, :GRID_COLUMNS]
    names = [drawn.name(number) for number in shown[:, 0].tolist()]
    if grid is not None:
        images = open_samples(out)
        pixels = np.stack([images.pixels(number) for number in shown.flatten().tolist()])
        rows = image_grid(torch.from_numpy(pixels).movedim(-1, 1) / 255, shown.shape[1])
        save_image(with_row_names(rows, names), grid)
        print(f"grid in {grid}")
    if strip is not None:
        rows = formation_strip(drawn.stream_images(shown[:STRIP_ROWS, 0].tolist()))
        save_image(with_row_names(rows, names[:STRIP_ROWS]), strip)
        print(f"strip in {strip}")
    if animation is not None:
        numbers = shown[:STRIP_ROWS].flatten().tolist()
        frames = [image_grid(step, shown.shape[1]) for step in drawn.stream_images(numbers)]
        save_animation([with_row_names(frame, names[:STRIP_ROWS]) for frame in frames], animation)
        print(f"animation in {animation}")
