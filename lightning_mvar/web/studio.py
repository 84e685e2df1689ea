"""What the page of `serve` asks of a pipeline: inputs are checked here, whatever a browser lets through."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageOps

from lightning_mvar.data.classes import UNCONDITIONAL, Classes, plain
from lightning_mvar.data.images.decoding import IMAGE_ERRORS
from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline, fitted
from lightning_mvar.sampling.grids import picture_grid

MAX_PICTURES, MAX_GUIDANCE, MAX_TOP_K, MIN_TOP_P = 8, 100, 1_000_000, 0.001
MAX_SEED = 2**53 - 1  # a browser's numbers are whole up to there
MAX_PIXELS = 50_000_000  # of an upload
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow would start other programs for some
CANVAS = 512  # pixels that a picture's longer side is enlarged to at least, so that one can paint on it
INSIDE, OUTSIDE = "what is painted over", "everything else"


class Drawn(NamedTuple):
    """Pictures as they are after a scale."""

    pictures: list[Image.Image]
    sheet: Image.Image  # all of them
    scale: str


class Studio:
    """Draws with a pipeline what somebody fills in on a page.

    Its methods raise InputError for whatever cannot be done.
    """

    def __init__(self, pipe: MVARPipeline) -> None:
        self.pipe = pipe
        height, width = pipe.shape
        self.enlarged = -(-CANVAS // max(height, width))  # times
        self.canvas = (width * self.enlarged, height * self.enlarged)

    def draw(self, *fields: Any) -> Iterator[Drawn]:
        """Pictures of a class, scale by scale; the fields are those of `settings`."""
        yield from self.forming(**settings(*fields))

    def paint(self, editor: dict[str, Any] | None, where: str, *fields: Any) -> Iterator[Drawn]:
        """An editor's picture with what is painted over drawn anew, or with all else (`where`)."""
        image, mask = self.painted(editor)
        if where not in (INSIDE, OUTSIDE):
            raise InputError(f"choose what to draw anew: {INSIDE!r} or {OUTSIDE!r}, not {where!r}")
        if where == OUTSIDE:
            mask = ImageChops.invert(mask)
        yield from self.forming(image=image, mask=mask, **settings(*fields))

    def forming(self, **arguments: Any) -> Iterator[Drawn]:
        shapes = self.pipe.network.config.schedule.shapes
        for (height, width), pictures in zip(shapes, self.pipe.forming(**arguments), strict=True):
            yield Drawn(pictures, sheet_of(pictures), f"{height} x {width}")

    def painted(self, editor: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
        """The picture of an editor and its mask, white where there is paint."""
        if editor is None or editor["background"] is None:
            raise InputError("there is no picture to paint on: upload one, or take a drawn one")
        image, mask = editor["background"].convert("RGB"), Image.new("L", editor["background"].size)
        for layer in editor["layers"]:
            paint = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha else 0)
            mask = ImageChops.lighter(mask, paint)
        if mask.getbbox() is None:
            raise InputError("nothing is painted over: choose the brush and paint on the picture")
        if image.size == self.canvas:  # undoes `on_canvas`, to the last bit
            return image.reduce(self.enlarged), mask.reduce(self.enlarged)
        return image, mask

    def on_canvas(self, image: Image.Image) -> Image.Image:
        """What the network sees of a picture, each pixel as a square."""
        return fitted(image.convert("RGB"), self.pipe.shape).resize(self.canvas, Image.Resampling.NEAREST)

    def upload(self, path: str) -> Image.Image:
        """A file as a picture to paint on."""
        name = Path(path).name
        try:
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return self.on_canvas(ImageOps.exif_transpose(file))
        except Image.DecompressionBombError as error:
            raise InputError(f"{name} is too large: reduce it to {MAX_PIXELS // 10**6} megapixels") from error
        except IMAGE_ERRORS as error:
            raise InputError(f"{name} cannot be read as a picture: use {', '.join(FORMATS)}") from error

    def take(self, pictures: Sequence[tuple[Image.Image, str | None]] | None, chosen: int) -> Image.Image:
        """One of the drawn pictures as a picture to paint on."""
        if not pictures:
            raise InputError("nothing is drawn yet: draw a picture first, or upload one")
        return self.on_canvas(pictures[chosen if chosen < len(pictures) else 0][0])


def settings(wanted: Any, count: Any, guidance: Any, top_k: Any, top_p: Any, seed: Any, smooth: Any) -> dict[str, Any]:
    """Arguments of `MVARPipeline.forming` for `count` pictures of a class, from what the page's fields hold."""
    if wanted is None or not str(wanted).strip():
        raise InputError(f"choose a class, or {UNCONDITIONAL!r}")
    return {
        "classes": [str(wanted)] * whole("pictures", count, 1, MAX_PICTURES),
        "guidance": number("guidance", guidance, 0, MAX_GUIDANCE),
        "top_k": whole("top-k", top_k, 0, MAX_TOP_K),
        "top_p": number("top-p", top_p, MIN_TOP_P, 1),
        "seed": whole("seed", seed, 0, MAX_SEED),
        "smooth": bool(smooth),
    }


def number(name: str, value: Any, low: float, high: float, kind: str = "number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} must be a {kind} from {low} to {high}, not {'empty' if value is None else value}")
    return value


def whole(name: str, value: Any, low: int, high: int) -> int:
    if number(name, value, low, high, "whole number") != int(value):
        raise InputError(f"{name} must be a whole number, not {value}")
    return int(value)


def class_menu(classes: Classes) -> list[tuple[str, str]]:
    """What a menu of the classes shows, and what `Classes.label` knows each by."""
    menu = [(UNCONDITIONAL, UNCONDITIONAL)]
    for label in range(classes.count):
        name, shared = classes.name(label), len(classes.labels[plain(classes.name(label))]) > 1
        menu.append((name if name == str(label) else f"{label}  {name}", str(label) if shared else name))
    return menu


def sheet_of(pictures: list[Image.Image]) -> Image.Image:
    """Pictures as one."""
    return pictures[0] if len(pictures) == 1 else picture_grid(pictures, math.ceil(math.sqrt(len(pictures))))
