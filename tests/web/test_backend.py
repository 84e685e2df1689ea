"""Tests of the page's backend: it returns the pipeline's images and rejects invalid input."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SCHEDULE, random_image, stack_images, tiny_network
from PIL import Image

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import TrainedModel
from lightning_mvar.data.classes import Classes
from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.web.backend import INSIDE, OUTSIDE, PageBackend, class_menu, sampling_arguments

FIELDS = ("3", 2, 2.0, 20, 0.9, 0.8, 7.0, False, False, 0.5, 1.0, 0.0, 0.0)
SETTINGS: dict[str, Any] = {"guidance": 2.0, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "seed": 7}


@pytest.fixture
def backend(tokenizer: Tokenizer) -> PageBackend:
    return PageBackend(MVARPipeline(TrainedModel(tiny_network(), tokenizer, []), device="cpu"))


def left_half(size: tuple[int, int], color: Any, mode: str) -> Image.Image:
    """Returns an empty image with its left half filled."""
    image = Image.new(mode, size)
    image.paste(color, (0, 0, size[0] // 2, size[1]))
    return image


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("smooth", [False, True])
def test_draw_matches_the_pipeline_at_every_scale(backend: PageBackend, smooth: bool) -> None:
    previews = list(backend.draw(*FIELDS[:7], smooth, *FIELDS[8:]))
    expected = list(backend.pipe.stream_images(["3", "3"], smooth=smooth, **SETTINGS))
    assert [preview.caption for preview in previews] == [f"{side} x {side}" for side in SCHEDULE.side_lengths]
    for preview, images in zip(previews, expected, strict=True):
        assert (stack_images(preview.images) == stack_images(images)).all()
        assert preview.sheet.width > 2 * 8
        assert preview.sheet.height > 8


def test_a_curve_guides_each_scale_by_its_own_strength(backend: PageBackend) -> None:
    *_, last = backend.draw(*FIELDS[:8], True, *FIELDS[9:])
    expected = backend.pipe(["3", "3"], **(SETTINGS | {"guidance": FIELDS[9:]}))
    assert (stack_images(last.images) == stack_images(expected)).all()


@pytest.mark.parametrize("region", [INSIDE, OUTSIDE])
def test_inpaint_matches_the_pipeline(backend: PageBackend, region: str) -> None:
    image, size = random_image(), backend.canvas_size
    strokes = [left_half(size, (255, 0, 0, 128), "RGBA"), Image.new("RGBA", size)]
    background, layers = png(backend.to_canvas(image).convert("RGBA")), [png(stroke) for stroke in strokes]
    mask = left_half((8, 8), 255, "L")
    if region == OUTSIDE:
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    *_, last = backend.inpaint(background, layers, region, *FIELDS)
    assert (stack_images(last.images) == stack_images(backend.pipe.edit(image, mask, ["3", "3"], **SETTINGS))).all()


def test_images_of_any_size_can_be_inpainted(backend: PageBackend) -> None:
    image = random_image((40, 16))
    layer = left_half(image.size, (0, 0, 0, 255), "RGBA")
    *_, last = backend.inpaint(png(image), [png(layer)], INSIDE, *FIELDS)
    expected = backend.pipe.edit(image, left_half(image.size, 255, "L"), ["3", "3"], **SETTINGS)
    assert (stack_images(last.images) == stack_images(expected)).all()


def test_a_canvas_without_image_or_paint_is_rejected(backend: PageBackend) -> None:
    empty, image = png(Image.new("RGBA", backend.canvas_size)), png(random_image(backend.canvas_size))
    small = png(left_half((8, 8), "red", "RGBA"))
    cases: list[tuple[Any, list[bytes], str, str]] = [
        (None, [], INSIDE, "there is no image to paint on"),
        (None, [empty], INSIDE, "there is no image to paint on"),
        (png(random_image()), [], INSIDE, "nothing is painted: choose the brush"),
        (image, [empty], OUTSIDE, "nothing is painted: choose"),
        (png(random_image()), [small], "here", "choose what to redraw"),
        (image, [small], INSIDE, "a layer is 8 x 8: resize it to the size of the image, 512 x 512"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", [small], INSIDE, "the image cannot be read as an image: use PNG, JPEG"),
        (image, [b"%PDF-1.4"], INSIDE, "a layer cannot be read as an image: use PNG, JPEG"),
        (png(Image.new("1", (8_000, 8_000))), [small], INSIDE, "the image is too large: reduce it to 50 megapixels"),
    ]
    for background, layers, region, message in cases:
        with pytest.raises(InputError, match=message):
            next(backend.inpaint(background, layers, region, *FIELDS))


def test_an_image_lies_on_white_as_in_tokenize(backend: PageBackend) -> None:
    """Colors under transparent pixels stay hidden, and 16-bit gray keeps its shades."""
    hidden, gray = Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("I;16", (8, 8), 128 * 257)
    paint = [png(Image.new("RGBA", (8, 8), "red"))]
    assert backend.image_and_mask(png(hidden), paint)[0].getextrema() == ((255, 255),) * 3
    assert backend.image_and_mask(png(gray), paint)[0].getextrema() == ((128, 128),) * 3


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, None, "choose a class"),
        (0, " ", "choose a class"),
        (0, ["3"], "choose a class"),
        (1, 10**9, "images must be an integer from 1 to 8, got 1000000000"),
        (1, {"count": 1}, "images must be an integer from 1 to 8"),
        (2, "x" * 10**6, f"guidance must be a number from 0 to 1,000, got {'x' * 80}$"),
        (1, 0, "images must be an integer from 1 to 8, got 0"),
        (1, 9, "images must be an integer from 1 to 8, got 9"),
        (1, 1.5, "images must be an integer from 1 to 8, got 1.5"),
        (2, "abc", "guidance must be a number from 0 to 1,000, got abc"),
        (2, -5, "guidance must be a number from 0 to 1,000, got -5"),
        (2, 1e9, "guidance must be a number"),
        (2, float("nan"), "guidance must be a number"),
        (2, None, "guidance is empty: enter a number"),
        (3, None, "top-k is empty: enter a number"),
        (3, -1, "top-k must be an integer"),
        (4, -0.1, "top-p must be a number from 0 to 1, got -0.1"),
        (4, True, "top-p must be a number"),
        (5, 0, "temperature must be a number from 0.001 to 1,000, got 0"),
        (6, float("inf"), "seed must be an integer"),
        (6, 2**53, "seed must be an integer from 0 to 9,007,199,254,740,991"),
        (7, "false", "smooth must be True or False, got 'false'"),
        (7, None, "smooth must be True or False, got None"),
        (8, 1, "guidance by scale must be True or False, got 1"),
    ],
)
def test_invalid_field_values_are_rejected(index: int, value: Any, message: str) -> None:
    fields = list(FIELDS)
    fields[index] = value
    with pytest.raises(InputError, match=message):
        sampling_arguments(*fields)


def test_an_invalid_strength_of_a_scale_is_rejected() -> None:
    with pytest.raises(InputError, match="guidance of scale 1 must be a number from 0 to 1,000, got -1"):
        sampling_arguments(*FIELDS[:8], True, 0.5, -1)


@pytest.mark.parametrize("name", ["eleven", "../x", "-1", "10"])
def test_an_unknown_class_is_rejected(backend: PageBackend, name: str) -> None:
    with pytest.raises(InputError, match=f"there is no class '{name}'; use numbers 0 to 9"):
        next(backend.draw(name, *FIELDS[1:]))


def test_uploads_are_put_on_the_canvas_or_rejected(backend: PageBackend, tmp_path: Path) -> None:
    random_image((8, 8)).save(tmp_path / "small.png")
    canvas = backend.load_upload(tmp_path / "small.png")
    assert canvas.size == backend.canvas_size
    assert (np.asarray(canvas.reduce(backend.zoom)) == np.asarray(random_image((8, 8)))).all()
    for data in (b"hello", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4"):
        (tmp_path / "text.png").write_bytes(data)
        with pytest.raises(InputError, match=r"text.png cannot be read as an image: use PNG, JPEG"):
            backend.load_upload(tmp_path / "text.png")
    for side in (8_000, 20_000):  # Pillow itself rejects the second one
        Image.new("1", (side, side)).save(tmp_path / "huge.png")
        with pytest.raises(InputError, match=r"huge.png is too large: reduce it to 50 megapixels"):
            backend.load_upload(tmp_path / "huge.png")


def test_a_drawn_image_is_put_on_the_canvas(backend: PageBackend, tmp_path: Path) -> None:
    drawn = [tmp_path / "0.png", tmp_path / "1.png"]
    random_image((8, 8)).save(drawn[0])
    Image.new("RGB", (8, 8), "red").save(drawn[1])
    assert backend.load_drawn(drawn, 1).getpixel((0, 0)) == (255, 0, 0)
    for index in (5, -1, None, "x", 0.5):
        assert (np.asarray(backend.load_drawn(drawn, index)) == np.asarray(backend.load_drawn(drawn, 0))).all()
    with pytest.raises(InputError, match="nothing is drawn yet"):
        backend.load_drawn([], 0)


@pytest.mark.parametrize(("names", "count"), [([], 10), ([], 1000), (["2", "1", "0"], 3), (["a", "b", "a"], 3)])
def test_every_menu_choice_resolves_to_its_label(names: list[str], count: int) -> None:
    classes = Classes(names, count)
    (unconditional, name), *menu = class_menu(classes)
    assert (unconditional, classes.label(name)) == ("unconditional", count)
    assert [classes.label(name) for _, name in menu] == list(range(count))
    assert all(str(label) in shown and classes.name(label) in shown for label, (shown, _) in enumerate(menu))
