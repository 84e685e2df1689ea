"""`edit`: inpainting, outpainting and class-conditional editing of an image, as in the VAR paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from lightning_mvar.checkpoints import WhichWeights, load_trained
from lightning_mvar.cli.arguments import refuse_overwriting, require_suffix
from lightning_mvar.data.images.decoding import read_image
from lightning_mvar.data.tokens.verify import counted
from lightning_mvar.devices import Precision
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.pipeline import MVARPipeline, fitted
from lightning_mvar.sampling.grids import image_grid, save_image, with_row_names
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.scales import Shape, format_shape

MAX_COUNT = 1000  # images per class, all drawn at once
REDRAWN_COLOR = (255, 0, 255)  # marks the redrawn part in --picture


def edit(
    ckpt_path: str,
    image: str,
    out: str,
    classes: str,
    box: str | None = None,
    mask: str | None = None,
    outside: bool = False,
    count: int = 1,
    picture: str | None = None,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    device: str = "auto",
    precision: Precision = "float32",
    **sampling: Any,
) -> None:
    """Redraws a part of an image, as the same or another class. At every scale, the network samples the tokens inside
    that part and keeps the image's own tokens elsewhere; the kept part therefore shows the tokenizer's reconstruction
    of the image. A token is redrawn if at least half of its cell is in that part; see `kept_tokens_mask` for how VAR's
    masks differ.

    Args:
        ckpt_path: checkpoint of `fit`, folder of `export`, published file, or a known name such as `var-d16`.
        image: image file of any size; it is resized and center-cropped.
        out: folder for NUMBER.png.
        classes: comma-separated class names (which may contain commas), WordNet ids or numbers, or "unconditional".
        box: LEFT,TOP,RIGHT,BOTTOM of the part to redraw, in pixels at the network's resolution.
        mask: instead of --box, an image file that is white in the part to redraw, of the same size as the image or as
            the network's images.
        outside: redraw everything outside the box or mask and keep the inside.
        count: images per class.
        picture: PNG file for a figure with one row per class: the image, the part to redraw, and the results.
        tokenizer: folder of the tokenizer, if it is no longer at the path recorded in the checkpoint.
        weights: for a checkpoint, `ema` for the averaged weights if it has them, `raw` for the last ones.
        device: auto, cpu, cuda or cuda:N.
        precision: precision of network and decoder.
        sampling: guidance scale, top-k, top-p, smooth, seed and others.
    """
    if (box is None) == (mask is None):
        raise InputError("give either --box LEFT,TOP,RIGHT,BOTTOM or --mask FILE to choose the part to redraw")
    SamplingSettings(**sampling)  # raises InputError for values out of range, before weights are read
    require_in(f"[1, {MAX_COUNT}]", "--", count=count)
    if Path(out).is_file() or Path(out).suffix:
        raise InputError(f"--out {out} must be a folder")
    require_suffix((".png",), {"--picture": picture})
    original = read_image(image)
    pipe = MVARPipeline(load_trained(ckpt_path, tokenizer, weights), device, precision)
    region = box_mask(box, pipe.shape) if box is not None else read_image(str(mask)).convert("L")
    region = ImageOps.invert(region) if outside else region
    names = [name for name in pipe.classes.split(classes) for _ in range(count)]
    files = [Path(out) / f"{number:06d}.png" for number in range(len(names))]
    outputs = {"--picture": picture} | {f"image {number} of --out": file for number, file in enumerate(files)}
    refuse_overwriting(outputs, {"--image": image, "--mask": mask, "--ckpt_path": ckpt_path, "--tokenizer": tokenizer})
    edited = pipe.edit(original, region, names, **sampling)
    with lock_folder(Path(out), "edit"):
        for file, result in zip(files, edited, strict=True):
            with atomic_path(file) as path:
                result.save(path)
    print(f"{counted(len(edited), 'image')} in {out}")
    if picture is not None:
        save_comparison(fitted(original, pipe.shape), fitted(region, pipe.shape), edited, names[::count], picture)
        print(f"original, part to redraw and results in {picture}")


def save_comparison(
    before: Image.Image, region: Image.Image, edited: list[Image.Image], names: list[str], path: str
) -> None:
    """Saves a figure with one named row per class: the image, the part to redraw (white in `region`), and results."""
    marked = Image.composite(Image.new("RGB", before.size, REDRAWN_COLOR), before, region)
    count = len(edited) // len(names)
    rows = [edited[begin : begin + count] for begin in range(0, len(edited), count)]
    panels = torch.from_numpy(np.stack([np.asarray(panel) for row in rows for panel in (before, marked, *row)]))
    save_image(with_row_names(image_grid(panels.movedim(-1, 1) / 255, count + 2), names), path)


def box_mask(box: str, shape: Shape) -> Image.Image:
    """Returns a mask that is white inside the box and black outside."""
    corners = [int(part) if part.strip().isdecimal() else -1 for part in box.split(",")]
    left, top, right, bottom = corners if len(corners) == 4 else [-1] * 4
    height, width = shape
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"--box {box} must be LEFT,TOP,RIGHT,BOTTOM within {format_shape(shape)} pixels, with "
            f"LEFT < RIGHT and TOP < BOTTOM"
        )
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask
