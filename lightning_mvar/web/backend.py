"""Backend of the web page of `serve`: checks all input, because a browser may send anything, and runs the pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops

from lightning_mvar.data.classes import UNCONDITIONAL, Classes, normalized
from lightning_mvar.data.images.decoding import FORMATS, TooManyPixelsError, UnusableFileError, decode_upright, to_rgb
from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline, fitted, format_size
from lightning_mvar.sampling.grids import picture_grid
from lightning_mvar.sampling.settings import SamplingSettings
from lightning_mvar.sampling.values import integer, number

MAX_IMAGES = 8
MAX_SEED = 2**53 - 1  # a browser rounds larger integers, so it would send another seed than the one entered
MAX_PIXELS = 50_000_000  # in an image file
MIN_CANVAS_SIDE = 512  # pixels of the longer side; smaller images are enlarged to leave room to paint
INSIDE, OUTSIDE = "the painted area", "everything else"  # regions to redraw


class ScalePreview(NamedTuple):
    """Images decoded after one scale."""

    images: list[Image.Image]
    sheet: Image.Image  # all images in one grid
    caption: str


class PageBackend:
    """Draws and inpaints with a pipeline, given the raw field values of the page.

    Its methods raise InputError for invalid input.
    """

    def __init__(self, pipe: MVARPipeline) -> None:
        self.pipe = pipe
        height, width = pipe.shape
        self.zoom = -(-MIN_CANVAS_SIDE // max(height, width))  # an integer, so that pixels become squares
        self.canvas_size = (width * self.zoom, height * self.zoom)

    def draw(self, *fields: Any) -> Iterator[ScalePreview]:
        """Draws images of a class scale by scale; `fields` are the arguments of `sampling_arguments`."""
        yield from self.stream(**sampling_arguments(*fields))

    def inpaint(
        self, background: bytes | None, layers: Sequence[bytes], region: str, *fields: Any
    ) -> Iterator[ScalePreview]:
        """Redraws the painted area of an editor's image, or everything else, as `region` says.

        Args:
            background: content of an image file, None if there is none.
            layers: contents of image files, opaque where there is paint.
            region: `INSIDE` or `OUTSIDE`.
            fields: arguments of `sampling_arguments`.
        """
        image, mask = self.image_and_mask(background, layers)
        if region not in (INSIDE, OUTSIDE):
            raise InputError(f"choose what to redraw: {INSIDE!r} or {OUTSIDE!r}, not {region!r}")
        if region == OUTSIDE:
            mask = ImageChops.invert(mask)
        yield from self.stream(image=image, mask=mask, **sampling_arguments(*fields))

    def stream(self, **arguments: Any) -> Iterator[ScalePreview]:
        """Yields previews, coarse to fine; the arguments are those of `MVARPipeline.stream_images`."""
        shapes = self.pipe.network.config.schedule.shapes
        for (height, width), images in zip(shapes, self.pipe.stream_images(**arguments), strict=True):
            yield ScalePreview(images, contact_sheet(images), f"{height} x {width}")

    def image_and_mask(self, background: bytes | None, layers: Sequence[bytes]) -> tuple[Image.Image, Image.Image]:
        """Returns the image of an editor and its mask, white where there is paint."""
        if background is None:
            raise InputError("there is no image to paint on: upload one, or use a drawn one")
        image = to_rgb(decode(background, "the image"))
        mask = Image.new("L", image.size)
        for layer in layers:
            paint = decode(layer, "a layer").convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha else 0)
            if paint.size != image.size:
                raise InputError(
                    f"a layer is {format_size(paint)}: resize it to the size of the image, {format_size(image)}"
                )
            mask = ImageChops.lighter(mask, paint)
        if mask.getbbox() is None:
            raise InputError("nothing is painted: choose the brush and paint on the image")
        if image.size == self.canvas_size:  # inverts `to_canvas` exactly
            return image.reduce(self.zoom), mask.reduce(self.zoom)
        return image, mask

    def to_canvas(self, image: Image.Image) -> Image.Image:
        """Crops and resizes an RGB image to the network's resolution, then enlarges each pixel to a square."""
        return fitted(image, self.pipe.shape).resize(self.canvas_size, Image.Resampling.NEAREST)

    def load_upload(self, path: Path) -> Image.Image:
        """Reads an uploaded file and returns it on the canvas."""
        return self.to_canvas(to_rgb(decode(path.read_bytes(), path.name)))

    def load_drawn(self, images: Sequence[Path], index: Any) -> Image.Image:
        """Returns drawn image number `index` on the canvas, or the first one if there is no such number."""
        if not images:
            raise InputError("nothing is drawn yet: draw an image first, or upload one")
        known = isinstance(index, int) and 0 <= index < len(images)
        return self.load_upload(images[index if known else 0])


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes an image file; `name` is for messages.

    Raises:
        InputError: if it is too large or not an image.
    """
    try:
        return decode_upright(data, MAX_PIXELS)
    except TooManyPixelsError as error:
        raise InputError(f"{name} is too large: reduce it to {MAX_PIXELS // 10**6} megapixels") from error
    except UnusableFileError as error:
        raise InputError(f"{name} cannot be read as an image: use {', '.join(FORMATS)}") from error


def sampling_arguments(
    class_name: Any,
    count: Any,
    guidance: Any,
    top_k: Any,
    top_p: Any,
    temperature: Any,
    seed: Any,
    smooth: Any,
    by_scale: Any,
    *strengths: Any,
) -> dict[str, Any]:
    """Checks the page's fields; returns arguments of `MVARPipeline.stream_images` for `count` images of a class.

    If `by_scale`, `strengths` has the guidance scale of each scale; otherwise the guidance scale grows to `guidance`.
    """
    name = str(class_name).strip() if isinstance(class_name, str | int) else ""
    if not name:
        raise InputError(f"choose a class, or {UNCONDITIONAL!r}")
    if not isinstance(by_scale, bool):
        raise InputError(f"guidance by scale must be True or False, got {by_scale!s:.80}")
    numbers = {"images": count, "top-k": top_k, "top-p": top_p, "temperature": temperature, "seed": seed}
    guided = {f"guidance of scale {k}": g for k, g in enumerate(strengths)} if by_scale else {"guidance": guidance}
    for field, value in (numbers | guided).items():
        if value is None:
            raise InputError(f"{field} is empty: enter a number")
    settings = {
        "guidance": [*strengths] if by_scale else guidance,
        "top_k": integer("top-k", whole(top_k)),
        "top_p": number("top-p", top_p, 1),
        "temperature": temperature,
        "seed": integer("seed", whole(seed), MAX_SEED),
        "smooth": smooth,
    }
    SamplingSettings(**settings)  # raises InputError for values out of range
    return {"classes": [name] * integer("images", whole(count), MAX_IMAGES, 1), **settings}


def whole(value: Any) -> Any:
    """Returns a float without a fraction as an int, because a client may send 5.0 for 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def class_menu(classes: Classes) -> list[tuple[str, str]]:
    """Returns the choices of the class menu as (displayed text, name that `Classes.label` accepts)."""
    menu = [(UNCONDITIONAL, UNCONDITIONAL)]
    for label in range(classes.count):
        name, ambiguous = classes.name(label), len(classes.labels[normalized(classes.name(label))]) > 1
        menu.append((name if name == str(label) else f"{label}  {name}", str(label) if ambiguous else name))
    return menu


def contact_sheet(images: list[Image.Image]) -> Image.Image:
    """Arranges images in one nearly square grid."""
    return images[0] if len(images) == 1 else picture_grid(images, math.ceil(math.sqrt(len(images))))
