"""`new`: the project of a set of pictures, whose commands parse and find each other's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from lightning_mvar.cli import run
from lightning_mvar.cli.arguments import check
from lightning_mvar.cli.training import TrainingCLI, parse_command
from lightning_mvar.commands.evaluate import evaluate
from lightning_mvar.commands.sample import sample
from lightning_mvar.commands.serve import serve
from lightning_mvar.commands.tokenize import tokenize
from lightning_mvar.commands.train_tokenizer import TokenizerCLI
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.projects.files import COMMANDS

PICTURES = 'my: "pics" \N{SNOWMAN}\N{ARTIST PALETTE}'  # no plain YAML, and beyond 16 bits


def write_pictures(folder: Path, count: int = 120, classes: int = 2) -> Path:
    """Writes pictures of one color each, in class folders unless there is one class."""
    for i in range(count):
        path = folder / (f"class {i % classes}" if classes > 1 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (2 * i, i, 255 - i)).save(path)
    return folder


@pytest.fixture(params=[2, 1])
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a project of pictures with classes, or without."""
    write_pictures(tmp_path / PICTURES, classes=request.param)
    monkeypatch.chdir(tmp_path)
    assert run(["new", "mine", "--images", PICTURES]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


def test_the_commands_of_a_project_parse_and_find_each_other(project: Path) -> None:
    tokenizing, training = (
        parse_command([command, "--config", f"{command}.yaml"], cli)
        for command, cli in (("train-tokenizer", TokenizerCLI), ("fit", TrainingCLI))
    )
    for function in (tokenize, sample, evaluate, serve):
        check(function, [function.__name__, "--config", f"{function.__name__}.yaml"])
    encoding, drawing, scoring = (read(project, name) for name in ("tokenize", "sample", "evaluate"))
    assert tokenizing.trainer.default_root_dir == encoding["tokenizer"] == training.model.tokenizer
    assert training.data.train == f"{encoding['out']}/train"
    assert training.data.val == f"{encoding['out']}/val"
    assert drawing["ckpt_path"] == f"{training.trainer.callbacks[0].init_args.dirpath}/last.ckpt"
    assert drawing["out"] == scoring["samples"]
    assert read(project, "serve").items() <= drawing.items()
    assert drawing["tokenizer"] == encoding["tokenizer"]  # the project may be moved, and checkpoints record a full path
    images = str(project.parent / PICTURES)
    assert encoding["images"] == images
    sources = tokenizing.data.train, tokenizing.data.val, scoring["floor"], scoring["reference"]
    assert sources == (f"{images}:train", f"{images}:val") * 2
    assert {part["on_corrupt"] for part in (scoring, scoring["extractor"]["init_args"])} == {"skip"}
    assert {tokenizing.data.margin, encoding["margin"], scoring["margin"]} == {1.0}
    assert 0 < len(open_images(sources[1], 8)) < len(open_images(sources[0], 8))


@pytest.mark.parametrize(("command", "cli"), [("train-tokenizer", TokenizerCLI), ("fit", TrainingCLI)])
def test_all_files_of_a_run_follow_its_folder(project: Path, command: str, cli: type[TrainingCLI]) -> None:
    options = ["--config", f"{command}.yaml", "--trainer.default_root_dir", "other"]
    trainer = parse_command([command, *options], cli).trainer
    assert trainer.callbacks[0].init_args.dirpath == "other/checkpoints"
    assert trainer.logger.init_args.save_dir == "other"


def read(project: Path, command: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((project / f"{command}.yaml").read_text(encoding="utf-8"))
    return content


def test_the_commands_are_printed_and_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = write_pictures(tmp_path / "pics")
    (pictures / "class 0/torn.png").write_bytes(b"")
    Image.new("RGB", (16, 8)).save(pictures / "class 0/0.png")
    assert run(["new", "mine", "--images", "pics", "--resolution", "128"]) == 0
    printed = capsys.readouterr().out
    readme = (tmp_path / "mine/README.md").read_text()
    for command in COMMANDS:
        line = f"lightning-mvar {command} --config {command}.yaml"
        assert line in printed
        assert line in readme
        assert line in (tmp_path / f"mine/{command}.yaml").read_text()
    assert "class 0/torn.png cannot be decoded" in printed
    assert printed.startswith("8 to 16 pixels wide, 8 high\n")
    held_out = len(open_images("pics:val", 8, "skip"))
    assert 0 < held_out < 121
    assert f"{121 - held_out} pictures to train on, {held_out} held out for validation\n128 x 128 pixels, " in printed
    assert " pixels, nothing is cut off, except the ends of 1% of the pictures, which are not square\n" in printed
    assert torch.cuda.is_available() or "128 pixels are meant for GPUs" in printed
    assert readme.startswith("# 2 classes, 121 images: class 0 (61), class 1 (60)\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pics", "--images", "pics"], "pics exists and is not empty: choose another folder"),
        (["pics/mine", "--images", "pics"], "pics/mine is inside --images pics, among the pictures"),
        (["mine", "--images", "pics", "--resolution", "48"], "--resolution 48 has no recipe: choose one of 32, 64"),
        (["mine", "--images", "nowhere"], "nowhere does not exist"),
        (["mine", "--images", "empty"], "no images under"),
        (["mine", "--images", "few"], "3 pictures are too few to train on: give at least 100"),
        (["mine", "--images", "pics:train"], "--images pics:train is already a split: pass pics"),
        (["mine", "--images", "digits:train"], "--images digits:train is built in"),
    ],
)
def test_what_makes_no_project_is_refused_in_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pics", 4)
    write_pictures(tmp_path / "few", 3)
    (tmp_path / "empty").mkdir()
    assert run(["new", *argv]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lightning-mvar: error: ")
    assert message in error
    assert not (tmp_path / "mine").exists()


def test_tokenize_holds_out_a_tenth(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pics", 40)
    argv = ["tokenize", "--images", "pics", "--tokenizer", str(tokenizer_folder), "--out", "shards", "--split"]
    assert run([*argv, "--views", "2"]) == 0
    for split, views in (("train", 2), ("val", 1)):
        manifest = Manifest.load(tmp_path / "shards" / split)
        assert manifest.source == f"pics:{split}"
        assert (manifest.num_images, manifest.views) == (len(open_images(f"pics:{split}", 8)), views)
        assert manifest.num_samples == views * manifest.num_images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("pics", "pics:val has no images: pics has too few images to hold out a tenth"),
        ("pics:train", "--images pics:train is already a split: pass pics"),
        ("digits:train", "--images digits:train is one split of a built-in set: leave out --split"),
    ],
)
def test_what_cannot_be_split_is_refused_before_any_image_is_encoded(
    images: str,
    message: str,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pics", 1)
    argv = ["tokenize", "--images", images, "--tokenizer", str(tokenizer_folder), "--out", "shards", "--split"]
    assert run(argv) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()
