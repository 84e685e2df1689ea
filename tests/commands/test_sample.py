"""Sets of samples that are interrupted, continued, and refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_network
from PIL import Image

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.cli import run
from lightning_mvar.commands import sample as command

SAMPLE = ["sample", "--ckpt_path", "model", "--per_class", "2", "--batch_size", "3", "--guidance", "0.5"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Path:
    """A network of ten classes in `model`."""
    save_folder(tmp_path / "model", tokenizer, tiny_network())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(target: Path) -> dict[str, np.ndarray]:
    if target.suffix == ".npz":
        with np.load(target) as arrays:
            return dict(arrays)
    return {str(path.relative_to(target)): np.asarray(Image.open(path)) for path in target.rglob("*.png")}


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_an_interrupted_set_is_completed_and_equals_an_uninterrupted_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = ["--out", f"whole{Path(name).suffix}", "--grid", "whole.png", "--strip", "whole_strip.png"]
    assert run([*SAMPLE, *whole]) == 0
    drawn: list[int] = []
    generate = command.generate

    def interrupted(network, tokenizer, labels, **settings):  # type: ignore[no-untyped-def]
        if stops and len(drawn) >= 6:
            raise KeyboardInterrupt
        drawn.extend(labels.tolist())
        return generate(network, tokenizer, labels, **settings)

    monkeypatch.setattr(command, "generate", interrupted)
    options, stops = ["--out", name, "--grid", "grid.png", "--strip", "strip.png"], True
    assert run([*SAMPLE, *options]) == 130
    assert not Path("set.npz").exists()
    stops = False
    assert run([*SAMPLE, *options]) == 0
    ten_of_the_strip = 10
    assert len(drawn) == 20 + ten_of_the_strip
    expected, found = contents(Path(whole[1])), contents(Path(name))
    assert expected.keys() == found.keys()
    assert all(np.abs(found[key].astype(int) - expected[key]).max() <= 1 for key in expected)
    for pair in (("grid.png", "whole.png"), ("strip.png", "whole_strip.png")):
        ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in pair)
        assert np.abs(ours - theirs).max() <= 1
    assert not Path("set.npz.partial").exists()


def test_a_set_is_not_continued_otherwise(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*SAMPLE, "--out", "set"]) == 0
    assert run([*SAMPLE, "--out", "set"]) == 0
    assert run([*SAMPLE, "--out", "set", "--seed", "1"]) == 1
    assert "set holds images that were sampled otherwise (see sampling.json in it)" in capfd.readouterr().err
    assert run([*SAMPLE, "--out", "other", "--top_p", "2"]) == 1
    assert not Path("other").exists()
    assert run([*SAMPLE, "--out", "model"]) == 1
    assert "model holds other files: choose another --out" in capfd.readouterr().err


def test_a_damaged_unfinished_set_is_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command, "generate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert run([*SAMPLE, "--out", "set.npz"]) == 130
    os.truncate("set.npz.partial/images.npy", 200)
    assert run([*SAMPLE, "--out", "set.npz"]) == 1
    assert "set.npz.partial/images.npy is damaged" in capfd.readouterr().err
