"""Tests of `edit`: inpainting from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import stack_images, tiny_network
from PIL import Image

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.cli import run
from lightning_mvar.pipeline import MVARPipeline

EDIT = ["edit", "--ckpt_path", "model", "--image", "photo.png", "--out", "edited"]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Path:
    """Folder with a network in `model` and a photo of 12 x 10 pixels (width x height)."""
    save_folder(tmp_path / "model", tokenizer, tiny_network())
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return tmp_path


def read_results() -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path("edited").glob("*.png"))]).astype(int)


@pytest.mark.parametrize("outside", [False, True])
def test_a_box_and_the_same_mask_match_the_pipeline(workdir: Path, outside: bool) -> None:
    pipe, mask = MVARPipeline.from_pretrained("model", device="cpu"), Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 2, 4, 8))
    mask.save("mask.png")
    options = ["--classes", "3,7", "--count", "2", "--seed", "5", "--outside", str(outside).lower()]
    assert run([*EDIT, "--box", "0,2,4,8", *options, "--picture", "picture.png"]) == 0
    box_results = read_results()
    assert run([*EDIT, "--mask", "mask.png", *options]) == 0
    assert (read_results() == box_results).all()
    if outside:
        mask = mask.point(lambda value: 255 - value)
    expected = stack_images(pipe.edit(Image.open("photo.png"), mask, [3, 3, 7, 7], seed=5))
    assert (box_results == expected).all()
    with Image.open("picture.png") as picture:
        margin = picture.width - (4 * 10 + 2)  # the names of the classes
        assert margin > 0
        assert picture.height == 2 * 10 + 2
        assert (np.asarray(picture)[2:10, margin + 22 : margin + 30] == expected[0]).all()


def test_redrawing_all_is_sampling_and_keeping_all_is_reconstruction(workdir: Path) -> None:
    pipe = MVARPipeline.from_pretrained("model", device="cpu")
    assert run([*EDIT, "--box", "0,0,8,8", "--classes", "3,unconditional"]) == 0
    assert (read_results() == stack_images(pipe([3, "unconditional"]))).all()
    assert run([*EDIT, "--box", "0,0,8,8", "--classes", "3,unconditional", "--outside", "true"]) == 0
    assert (read_results() == stack_images(pipe([3, 5], image=Image.open("photo.png")))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "3"], "give either --box LEFT,TOP,RIGHT,BOTTOM or --mask FILE"),
        (["--classes", "3", "--box", "0,0,8,8", "--mask", "mask.png"], "or --mask FILE to choose the part to redraw"),
        (["--classes", "3", "--box", "4,0,2,8"], "--box 4,0,2,8 must be LEFT,TOP,RIGHT,BOTTOM within 8 x 8 pixels"),
        (["--classes", "3", "--box", "0,0,9,8"], "within 8 x 8"),
        (["--classes", "3", "--box", "0,0,8"], "--box 0,0,8 must be LEFT,TOP,RIGHT,BOTTOM"),
        (["--classes", "3", "--box", "a,0,8,8"], "--box a,0,8,8 must be"),
        (["--classes", "3", "--mask", "nowhere.png"], "nowhere.png does not exist"),
        (
            ["--classes", "3", "--mask", "mask.png"],
            "the mask is 5 x 5: resize it to the size of the image, 10 x 12 (height x width), or",
        ),
        (["--classes", "3", "--mask", "text.png"], "text.png cannot be decoded"),
        (["--classes", "3", "--box", "0,0,8,8", "--image", "nowhere.png"], "nowhere.png does not exist"),
        (["--classes", "cat", "--box", "0,0,8,8"], "no class 'cat'"),
        (
            ["--classes", "3", "--box", "0,0,8,8", "--count", "0"],
            "--count must be in [1, 1000], got 0",
        ),
        (["--classes", "3", "--box", "0,0,8,8", "--out", "a.png"], "--out a.png must be a folder"),
        (["--classes", "3", "--box", "0,0,8,8", "--top_p", "1.5"], "top_p must be a number from 0 to 1"),
        (["--classes", "3", "--box", "0,0,8,8", "--count", str(2**63)], "--count must be in [1, 1000]"),
    ],
)
def test_errors_are_reported_without_traceback(
    workdir: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    Image.new("L", (5, 5)).save("mask.png")
    Path("text.png").write_text("hello")
    assert run([*EDIT, *options]) == 1
    stderr = capfd.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr
    assert not Path("edited").exists()
