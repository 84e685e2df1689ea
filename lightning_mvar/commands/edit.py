"""`edit`: a part of an image drawn anew: in-painting, out-painting, class-conditional editing, as VAR shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from lightning_mvar.checkpoints import WhichWeights, load_trained
from lightning_mvar.cli.arguments import call
from lightning_mvar.data.images.decoding import IMAGE_ERRORS
from lightning_mvar.devices import Precision
from lightning_mvar.errors import InputError
from lightning_mvar.io.files import atomic_path
from lightning_mvar.pipeline import MVARPipeline, fitted
from lightning_mvar.sampling.grids import image_grid, save_image
from lightning_mvar.scales import Shape, in_words

REDRAWN = (255, 0, 255)  # what is redrawn, in the picture


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
    seed: int = 0,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
    device: str = "auto",
    precision: Precision = "float32",
) -> None:
    """Draw a part of an image anew, as a class that may be another than the image's. At every scale, the image's own
    tokens stay outside that part, and the network draws those inside; so what is kept looks as the tokenizer has it.

    Args:
        ckpt_path: a checkpoint of `fit`, sharded or not, or a folder of `export`.
        image: a picture of any size; the largest part in its middle that has the shape of the network's is taken.
        out: folder for NUMBER.png.
        classes: comma-separated class names, WordNet ids or numbers, or "unconditional".
        box: LEFT,TOP,RIGHT,BOTTOM in pixels of a picture that the network draws: what to draw.
        mask: instead, a picture of the image's size, or of the network's: what is white is drawn.
        outside: draw what is outside of the box or mask, and keep what is inside.
        count: images of each class.
        picture: PNG file for a picture with a row for each class: the image, what is redrawn, and the results.
        seed: of the sampling.
        guidance: classifier-free guidance, 0 for none.
        top_k: draw among the k most likely tokens, 0 for all.
        top_p: then among the fewest whose probability reaches p, 1 for all.
        smooth: mix codes for smoother pictures.
        tokenizer: folder of the tokenizer, if it is no longer where the checkpoint remembers.
        weights: of a checkpoint, `ema` for those averaged over training where it has them, `raw` for the last.
        device: auto, cpu, cuda or cuda:N.
        precision: of network and decoder.
    """
    if (box is None) == (mask is None):
        raise InputError("give --box LEFT,TOP,RIGHT,BOTTOM or --mask FILE: one of them says what to draw")
    if count < 1:
        raise InputError(f"--count must be at least 1, got {count}")
    if Path(out).is_file() or Path(out).suffix:
        raise InputError(f"--out {out} must be a folder")
    given = open_picture(image)
    pipe = MVARPipeline(load_trained(ckpt_path, tokenizer, weights), device, precision)
    white = box_mask(box, pipe.shape) if box is not None else open_picture(str(mask)).convert("L")
    white = ImageOps.invert(white) if outside else white
    wanted = [name for name in classes.split(",") for _ in range(count)]
    settings = {"seed": seed, "guidance": guidance, "top_k": top_k, "top_p": top_p, "smooth": smooth}
    edited = pipe.edit(given, white, wanted, **settings)
    for number, result in enumerate(edited):
        with atomic_path(Path(out) / f"{number:06d}.png") as path:
            result.save(path)
    print(f"{len(edited)} images in {out}")
    if picture is not None:
        before = fitted(given.convert("RGB"), pipe.shape)
        hole = Image.composite(Image.new("RGB", before.size, REDRAWN), before, fitted(white, pipe.shape))
        rows = [edited[begin : begin + count] for begin in range(0, len(edited), count)]
        shown = torch.from_numpy(np.stack([np.asarray(p) for row in rows for p in (before, hole, *row)]))
        save_image(image_grid(shown.movedim(-1, 1) / 255, count + 2), picture)
        print(f"original, what is redrawn, results: {picture}")


def box_mask(box: str, shape: Shape) -> Image.Image:
    """White inside the box, black outside."""
    corners = [int(part) if part.strip().isdecimal() else -1 for part in box.split(",")]
    left, top, right, bottom = corners if len(corners) == 4 else [-1] * 4
    height, width = shape
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"--box {box} must be LEFT,TOP,RIGHT,BOTTOM within {in_words(shape)} pixels, left before "
            f"right and top before bottom"
        )
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


def open_picture(path: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            upright.load()
            return upright
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except IMAGE_ERRORS as error:
        raise InputError(f"{path} cannot be decoded ({error})") from error


def main(argv: list[str]) -> None:
    call(edit, argv)
