"""Backend of the web page of `serve`: checks all inputs, because a browser may send anything, and runs the pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops

from lightning_mvar.data.classes import UNCONDITIONAL, Classes, normalized
from lightning_mvar.data.images.decoding import FORMATS, IMAGE_ERRORS, decode_image, read_file, to_rgb
from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline, fitted
from lightning_mvar.sampling.grids import picture_grid

MAX_IMAGES, MAX_GUIDANCE, MAX_TOP_K, MIN_TOP_P = 8, 100, 1_000_000, 0.001
MAX_SEED = 2**53 - 1  # the largest integer that a browser's numbers hold exactly
MAX_PIXELS = 50_000_000  # per upload
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

    def inpaint(self, editor: dict[str, Any] | None, region: str, *fields: Any) -> Iterator[ScalePreview]:
        """Redraws the painted area of an editor's image, or everything else, as `region` says."""
        image, mask = self.image_and_mask(editor)
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

    def image_and_mask(self, editor: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
        """Returns the image of an editor and its mask, white where there is paint."""
        if editor is None or editor["background"] is None:
            raise InputError("there is no image to paint on: upload one, or use a drawn one")
        image, mask = to_rgb(editor["background"]), Image.new("L", editor["background"].size)
        for layer in editor["layers"]:
            paint = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha else 0)
            mask = ImageChops.lighter(mask, paint)
        if mask.getbbox() is None:
            raise InputError("nothing is painted: choose the brush and paint on the image")
        if image.size == self.canvas_size:  # inverts `to_canvas` exactly
            return image.reduce(self.zoom), mask.reduce(self.zoom)
        return image, mask

    def to_canvas(self, image: Image.Image) -> Image.Image:
        """Crops and resizes an image to the network's resolution, then enlarges each pixel to a square."""
        return fitted(image, self.pipe.shape).resize(self.canvas_size, Image.Resampling.NEAREST)

    def load_upload(self, path: str) -> Image.Image:
        """Reads an uploaded file and returns it on the canvas."""
        name = Path(path).name
        try:
            return self.to_canvas(decode_image(read_file(Path(path)), MAX_PIXELS))
        except Image.DecompressionBombError as error:
            raise InputError(f"{name} is too large: reduce it to {MAX_PIXELS // 10**6} megapixels") from error
        except IMAGE_ERRORS as error:
            raise InputError(f"{name} cannot be read as an image: use {', '.join(FORMATS)}") from error

    def load_drawn(self, images: Sequence[tuple[Image.Image, str | None]] | None, index: int) -> Image.Image:
        """Returns one of the drawn images on the canvas."""
        if not images:
            raise InputError("nothing is drawn yet: draw an image first, or upload one")
        return self.to_canvas(images[index if index < len(images) else 0][0])


def sampling_arguments(
    class_name: Any, count: Any, guidance: Any, top_k: Any, top_p: Any, seed: Any, smooth: Any
) -> dict[str, Any]:
    """Checks the page's fields; returns arguments of `MVARPipeline.stream_images` for `count` images of a class."""
    if class_name is None or not str(class_name).strip():
        raise InputError(f"choose a class, or {UNCONDITIONAL!r}")
    return {
        "classes": [str(class_name)] * check_integer("images", count, 1, MAX_IMAGES),
        "guidance": check_number("guidance", guidance, 0, MAX_GUIDANCE),
        "top_k": check_integer("top-k", top_k, 0, MAX_TOP_K),
        "top_p": check_number("top-p", top_p, MIN_TOP_P, 1),
        "seed": check_integer("seed", seed, 0, MAX_SEED),
        "smooth": bool(smooth),
    }


def check_number(name: str, value: Any, low: float, high: float, kind: str = "number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} must be a {kind} from {low} to {high}, not {'empty' if value is None else value}")
    return value


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    if check_number(name, value, low, high, "whole number") != int(value):
        raise InputError(f"{name} must be a whole number, not {value}")
    return int(value)


def class_menu(classes: Classes) -> list[tuple[str, str]]:
    """Returns each choice of the class menu: (text shown, name that `Classes.label` accepts)."""
    menu = [(UNCONDITIONAL, UNCONDITIONAL)]
    for label in range(classes.count):
        name, ambiguous = classes.name(label), len(classes.labels[normalized(classes.name(label))]) > 1
        menu.append((name if name == str(label) else f"{label}  {name}", str(label) if ambiguous else name))
    return menu


def contact_sheet(images: list[Image.Image]) -> Image.Image:
    """Arranges images in one nearly square grid."""
    return images[0] if len(images) == 1 else picture_grid(images, math.ceil(math.sqrt(len(images))))
