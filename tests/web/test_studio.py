"""What the page asks of a pipeline: the pipeline's own pictures, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SCHEDULE, tiny_network
from PIL import Image

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import TrainedModel
from lightning_mvar.data.classes import Classes
from lightning_mvar.errors import InputError
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.web.studio import INSIDE, OUTSIDE, Studio, class_menu, settings

FIELDS = ("3", 2, 2.0, 20, 0.9, 7, False)
SETTINGS: dict[str, Any] = {"guidance": 2.0, "top_k": 20, "top_p": 0.9, "seed": 7}


@pytest.fixture
def studio(tokenizer: Tokenizer) -> Studio:
    return Studio(MVARPipeline(TrainedModel(tiny_network(), tokenizer, []), device="cpu"))


def picture(size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def left_half(size: tuple[int, int], colour: Any, mode: str) -> Image.Image:
    """Nothing but a half in a colour."""
    image = Image.new(mode, size)
    image.paste(colour, (0, 0, size[0] // 2, size[1]))
    return image


def arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pictures])


@pytest.mark.parametrize("smooth", [False, True])
def test_it_draws_what_the_pipeline_draws_at_every_scale(studio: Studio, smooth: bool) -> None:
    found = list(studio.draw(*FIELDS[:-1], smooth))
    expected = list(studio.pipe.forming(["3", "3"], smooth=smooth, **SETTINGS))
    assert [step.scale for step in found] == [f"{side} x {side}" for side in SCHEDULE.side_lengths]
    for step, pictures in zip(found, expected, strict=True):
        assert (arrays(step.pictures) == arrays(pictures)).all()
        assert step.sheet.width > 2 * 8
        assert step.sheet.height > 8


@pytest.mark.parametrize("where", [INSIDE, OUTSIDE])
def test_in_painting_is_the_pipelines(studio: Studio, where: str) -> None:
    image, size = picture(), studio.canvas
    strokes = [left_half(size, (255, 0, 0, 128), "RGBA"), Image.new("RGBA", size)]
    editor = {"background": studio.on_canvas(image).convert("RGBA"), "layers": strokes, "composite": None}
    mask = left_half((8, 8), 255, "L")
    if where == OUTSIDE:
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    *_, last = studio.paint(editor, where, *FIELDS)
    assert (arrays(last.pictures) == arrays(studio.pipe.edit(image, mask, ["3", "3"], **SETTINGS))).all()


def test_pictures_of_any_size_can_be_painted_on(studio: Studio) -> None:
    image = picture((40, 16))
    editor = {"background": image, "layers": [left_half(image.size, (0, 0, 0, 255), "RGBA")], "composite": None}
    *_, last = studio.paint(editor, INSIDE, *FIELDS)
    expected = studio.pipe.edit(image, left_half(image.size, 255, "L"), ["3", "3"], **SETTINGS)
    assert (arrays(last.pictures) == arrays(expected)).all()


def test_a_canvas_without_picture_or_paint_is_refused(studio: Studio) -> None:
    empty = Image.new("RGBA", studio.canvas)
    cases: list[tuple[Any, str, str]] = [
        (None, INSIDE, "there is no picture to paint on"),
        ({"background": None, "layers": [empty]}, INSIDE, "there is no picture to paint on"),
        ({"background": picture(), "layers": []}, INSIDE, "nothing is painted over"),
        ({"background": picture(studio.canvas), "layers": [empty]}, OUTSIDE, "nothing is painted over"),
        ({"background": picture(), "layers": [left_half((8, 8), "red", "RGBA")]}, "here", "choose what to draw anew"),
    ]
    for editor, where, message in cases:
        with pytest.raises(InputError, match=message):
            next(studio.paint(editor, where, *FIELDS))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, None, "choose a class"),
        (0, " ", "choose a class"),
        (1, 0, "pictures must be a whole number from 1 to 8, not 0"),
        (1, 9, "pictures must be a whole number from 1 to 8, not 9"),
        (1, 1.5, "pictures must be a whole number, not 1.5"),
        (2, "abc", "guidance must be a number from 0 to 100, not abc"),
        (2, -5, "guidance must be a number from 0 to 100, not -5"),
        (2, 1e9, "guidance must be a number"),
        (2, float("nan"), "guidance must be a number"),
        (2, None, "guidance must be a number from 0 to 100, not empty"),
        (3, -1, "top-k must be a whole number"),
        (4, 0, "top-p must be a number from 0.001 to 1, not 0"),
        (4, True, "top-p must be a number"),
        (5, float("inf"), "seed must be a whole number"),
    ],
)
def test_fields_are_checked(place: int, value: Any, message: str) -> None:
    fields = list(FIELDS)
    fields[place] = value
    with pytest.raises(InputError, match=message):
        settings(*fields)


def test_a_class_that_is_none_is_refused(studio: Studio) -> None:
    with pytest.raises(InputError, match="there is no class 'eleven'; use numbers 0 to 9"):
        next(studio.draw("eleven", *FIELDS[1:]))


def test_uploads(studio: Studio, tmp_path: Path) -> None:
    picture((8, 8)).save(tmp_path / "small.png")
    canvas = studio.upload(str(tmp_path / "small.png"))
    assert canvas.size == studio.canvas
    assert (np.asarray(canvas.reduce(studio.enlarged)) == np.asarray(picture((8, 8)))).all()
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match=r"text.png cannot be read as a picture: use PNG, JPEG"):
        studio.upload(str(tmp_path / "text.png"))
    for side in (8_000, 20_000):  # the second is one that Pillow itself refuses
        Image.new("1", (side, side)).save(tmp_path / "huge.png")
        with pytest.raises(InputError, match=r"huge.png is too large: reduce it to 50 megapixels"):
            studio.upload(str(tmp_path / "huge.png"))


def test_a_drawn_picture_is_taken(studio: Studio) -> None:
    drawn = [(picture((8, 8)), None), (Image.new("RGB", (8, 8), "red"), None)]
    assert studio.take(drawn, 1).getpixel((0, 0)) == (255, 0, 0)
    assert (np.asarray(studio.take(drawn, 5)) == np.asarray(studio.on_canvas(drawn[0][0]))).all()
    with pytest.raises(InputError, match="nothing is drawn yet"):
        studio.take(None, 0)


@pytest.mark.parametrize(("names", "count"), [([], 10), ([], 1000), (["2", "1", "0"], 3), (["a", "b", "a"], 3)])
def test_every_choice_of_the_menu_is_its_class(names: list[str], count: int) -> None:
    classes = Classes(names, count)
    (unconditional, word), *menu = class_menu(classes)
    assert (unconditional, classes.label(word)) == ("unconditional", count)
    assert [classes.label(word) for _, word in menu] == list(range(count))
    assert all(str(label) in shown and classes.name(label) in shown for label, (shown, _) in enumerate(menu))
