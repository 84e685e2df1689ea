"""`train-scorer`, and sampling with what it writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_network, write_images

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import load_tokenizer, load_trained, save_folder
from lightning_mvar.cli import run
from lightning_mvar.commands import train_scorer as command
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.io.npz import read_text
from lightning_mvar.sampling.scorer import load_scorer

TRAIN = ["train-scorer", "--tokenizer", "model", "--real", "real", "--own", "own", "--out", "scorer"]
FEW = ["--steps", "2", "--batch_size", "4", "--width", "8", "--device", "cpu"]
DRAW = ["sample", "--ckpt_path", "model", "--per_class", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Tokens of images in `real`, and own samples of the network `model` in `own`."""
    folder = tmp_path_factory.mktemp("inputs")
    save_folder(folder / "model", tokenizer, tiny_network(num_classes=3), ["dark", "light", "mixed"])
    write_images(folder / "images", per_class=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["tokenize", "--images", "images", "--tokenizer", "model", "--out", "real", "--device", "cpu"]) == 0
        assert run([*DRAW, "--tokens", "own"]) == 0
    return folder


@pytest.fixture
def workdir(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `inputs` as the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(inputs, tmp_path, dirs_exist_ok=True))


def drawn(*options: str) -> np.ndarray:
    assert run([*DRAW, "--out", "drawn.npz", *options]) == 0
    return np.load("drawn.npz")["arr_0"]


def test_a_scorer_is_trained_and_chooses(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, *FEW, "--val", "real", "--own_val", "own"]) == 0
    output = capfd.readouterr().out
    assert "told apart" in output
    config = load_scorer("scorer").config
    assert (config.num_classes, config.quantizer) == (3, fingerprint(load_tokenizer("model").quantizer))
    assert "guidance=1.5" in config.drawn
    plain = drawn()
    Path("drawn.npz").unlink()
    chosen = drawn("--draft_scorer", "scorer", "--drafts", "4", "--draft_scales", "1", "2")
    assert (plain != chosen).any()
    about = json.loads(read_text(Path("drawn.npz"), "about"))
    assert (about["drafts"], about["draft_scales"]) == (4, "1,2")
    assert about["draft_scorer"] == fingerprint(load_scorer("scorer"))


def test_a_scorer_of_other_settings_or_another_network_is_warned_of(
    workdir: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    def warning(*options: str) -> str:
        caplog.clear()
        Path("drawn.npz").unlink(missing_ok=True)
        drawn("--drafts", "2", "--draft_scorer", "scorer", *options)
        return caplog.text

    assert run([*TRAIN, *FEW]) == 0
    assert warning() == ""
    changed = warning("--guidance", "0.5", "--temperature", "0.9")
    assert "samples with guidance 1.5 instead of 0.5, temperature default instead of 0.9, so its" in changed
    network = fingerprint(load_trained("model").network)
    save_folder(Path("model"), tokenizer, tiny_network(num_classes=3, depth=1), ["dark", "light", "mixed"])
    other = fingerprint(load_trained("model").network)
    assert f"samples with network {network} instead of {other}, so its" in warning()


def test_half_precision_leaves_pyramids_and_scores_in_float32(workdir: Path) -> None:
    assert run([*TRAIN, *FEW]) == 0
    assert drawn("--drafts", "3", "--draft_scorer", "scorer", "--precision", "bfloat16").shape == (6, 8, 8, 3)


def test_the_same_seed_trains_the_same_scorer(workdir: Path) -> None:
    weights = []
    for _ in range(2):
        assert run([*TRAIN, *FEW, "--seed", "3"]) == 0
        weights.append(Path("scorer/scorer.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch_size", "5"], "--batch_size 5 must be even"),
        (["--lr", "0"], "--lr must be positive, got 0.0"),
        (["--seed", "-1"], "--seed must be in [0,"),
        (["--batch_size", "16"], "own has 6 samples, fewer than the 8 of each step: lower --batch_size"),
        (["--val", "real"], "--val needs --own_val"),
        (["--own_val", "own"], "--own_val needs --val"),
        (["--own", "real"], "real holds tokens of images, not samples: draw some with `lightning-mvar sample --tokens"),
        (["--real", "own"], "own holds samples, not tokens of images"),
        (["--out", "own"], "would overwrite"),
        (["--val", "images", "--own_val", "own", "--out", "images"], "would overwrite the input --val images"),
    ],
)
def test_mistakes_are_named(options: list[str], message: str, workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, *FEW, *options]) == 1
    assert message in capfd.readouterr().err
    assert not Path("scorer").exists()


def test_a_folder_of_something_else_is_left_as_it_is(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("model", "exported")
    before = {path: path.read_bytes() for path in Path("exported").iterdir()}
    assert run([*TRAIN, *FEW, "--out", "exported"]) == 1
    assert "--out exported holds files other than a scorer" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in Path("exported").iterdir()} == before


def test_a_folder_in_use_is_refused_before_training(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mvar.io.locks.LOCK_TIMEOUT_S", 0)
    monkeypatch.setattr(command, "train", lambda *_: pytest.fail("trained"))
    with lock_folder(Path("scorer"), "train-scorer"):
        assert run([*TRAIN, *FEW]) == 1


def test_an_interruption_keeps_the_earlier_scorer(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*TRAIN, *FEW]) == 0
    before = fingerprint(load_scorer("scorer"))
    monkeypatch.setattr(command, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run([*TRAIN, *FEW, "--seed", "1"]) == 130
    assert "interrupted; no scorer was saved; run the same command again" in capfd.readouterr().err
    assert fingerprint(load_scorer("scorer")) == before


def copy_with_classes(source: str, target: str, names: list[str]) -> None:
    shutil.copytree(source, target)
    replace(Manifest.load(Path(source)), class_names=names).save(Path(target))


@pytest.mark.parametrize("options", [["--own", "own4"], ["--val", "real4", "--own_val", "own4"]], ids=str)
def test_shards_with_another_number_of_classes_are_refused(
    options: list[str], workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy_with_classes("real", "real4", ["a", "b", "c", "d"])
    copy_with_classes("own", "own4", ["0", "1", "2", "3"])  # of a network without class names, which any names fit
    assert run([*TRAIN, *FEW, *options]) == 1
    assert f"{options[1]} has 4 classes, but real has 3" in capfd.readouterr().err


def test_held_out_shards_are_verified(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("real", "val")
    shard = Path("val/000000.tar")
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    assert run([*TRAIN, *FEW, "--val", "val", "--own_val", "own"]) == 1
    assert str(shard) in capfd.readouterr().err
    assert not Path("scorer").exists()


def test_a_scorer_of_another_quantizer_is_refused(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, *FEW]) == 0
    config = json.loads(Path("scorer/config.json").read_text()) | {"quantizer": "0" * 16}
    Path("scorer/config.json").write_text(json.dumps(config))
    assert run([*DRAW, "--out", "drawn.npz", "--drafts", "2", "--draft_scorer", "scorer"]) == 1
    assert "the scorer in scorer was trained with quantizer 0000000000000000" in capfd.readouterr().err
    assert not Path("drawn.npz").exists()
