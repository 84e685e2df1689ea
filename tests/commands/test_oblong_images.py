"""Oblong images, from a folder of images to samples, scores and edits, by configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stages import FIT_YAML, TOKENIZER_YAML, run_stages, tags

from lightning_mvar.cli import run
from lightning_mvar.data.tokens.manifest import Manifest

SIDES = "[1, [1, 2], [2, 3], [4, 6]]"
SQUARE = "schedule: {side_lengths: [1, 2, 4]}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command line has trained a tokenizer and a network."""
    yamls = [text.replace(SQUARE, f"schedule: {{side_lengths: {SIDES}}}") for text in (TOKENIZER_YAML, FIT_YAML)]
    assert all(SIDES in text for text in yamls)
    yamls[0] = yamls[0].replace("resolution: 8,", "resolution: [8, 12],")
    return run_stages(tmp_path_factory.mktemp("workspace"), *yamls)


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


def test_scales_are_named_by_both_sides_in_logs_and_tables(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for logs, tag in (("tok/logs", "codebook_usage"), ("run/logs", "scale_loss")):
        assert {f"{tag}/{name}" for name in ("1", "1x2", "2x3", "4x6")} <= tags(here / logs)[0]
    assert run(["shards", "info", "shards/train", "--json", "info.json"]) == 0
    (record,) = json.loads(Path("info.json").read_text())
    assert [scale["scale"] for scale in record["scales"]] == ["1", "1x2", "2x3", "4x6"]
    assert [scale["tokens"] for scale in record["scales"]] == [18, 36, 108, 432]
    likelihood = ["likelihood", "--images", "images", "--ckpt_path", "export", "--device", "cpu"]
    assert run([*likelihood, "--json", "bits.json"]) == 0
    assert json.loads(Path("bits.json").read_text())[0]["bits_per_token_scale_4x6"] > 0


def test_finished_shards_are_kept_and_match_the_schedule(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenize = ["tokenize", "--images", "images", "--tokenizer", "tok", "--out", "shards/train"]
    assert run([*tokenize, "--shard_size", "7"]) == 0  # finished: there is nothing to do
    assert run(["shards", "verify", "shards/train", "--tokenizer", "tok"]) == 0
    assert Manifest.load(Path("shards/train")).schedule.num_tokens == 33
    assert run(["shards", "decode", "shards/train", "--tokenizer", "tok", "--out", "shards.png", "--n", "3"]) == 0
    other = ["--model.network.schedule.side_lengths", "[1, [2, 1], [3, 2], [6, 4]]"]
    capfd.readouterr()
    assert run(["fit", "--config", "fit.yaml", *other]) == 1
    assert "[1, [2, 1], [3, 2], [6, 4]]" in capfd.readouterr().err.replace("(", "[").replace(")", "]")


def test_samples_are_generated_and_scored(here: Path) -> None:
    for out in ("set.npz", "set"):
        assert run(["sample", "--ckpt_path", "export", "--out", out, "--per_class", "2", "--device", "cpu"]) == 0
        evaluate = ["evaluate", "--samples", out, "--reference", "images", "--extractor", "conftest.Pixels"]
        assert run([*evaluate, "--cache", "cache", "--device", "cpu", "--json", "scores.json"]) == 0
        (record,) = json.loads(Path("scores.json").read_text())
        assert (record["num_samples"], record["height"], record["width"]) == (6, 8, 12)
    samples = np.load("set.npz")["arr_0"]
    assert samples.shape == (6, 8, 12, 3)
    images = [np.asarray(Image.open(path)) for path in sorted(Path("set").rglob("*.png"), key=lambda p: p.name)]
    assert np.array_equal(samples, images)


def test_reconstructions_are_scored(here: Path) -> None:
    reconstruct = ["reconstruct", "--images", "images", "--tokenizer", "tok", "--device", "cpu"]
    assert run([*reconstruct, "--json", "scores.json", "--picture", "pairs.png"]) == 0
    (record,) = json.loads(Path("scores.json").read_text())
    assert (record["height"], record["width"]) == (8, 12)


def test_a_box_is_redrawn(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit = ["edit", "--ckpt_path", "export", "--image", "images/light/3.png", "--classes", "dark", "--device", "cpu"]
    assert run([*edit, "--out", "edited", "--box", "6,0,12,8", "--picture", "edited.png"]) == 0
    assert Image.open("edited/000000.png").size == (12, 8)
    assert run([*edit, "--out", "edited", "--box", "0,6,8,12"]) == 1
    assert "within 8 x 12 (height x width) pixels" in capfd.readouterr().err
