"""`sample --tokens`: token shards of a network's own samples, against `generate`; interrupted, resumed, refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MIXERS, SCHEDULE, tiny_network, write_images, write_token_shards
from lit_modules import make_module, make_trainer
from processes import start

from lightning_mvar import Tokenizer, generate
from lightning_mvar.checkpoints import load_trained, save_folder
from lightning_mvar.cli import run
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.packs import Pack
from lightning_mvar.data.tokens.shards import read_samples
from lightning_mvar.data.tokens.sources import LocalShards
from lightning_mvar.sampling import token_sets
from lightning_mvar.sampling.grids import to_uint8
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.sampler import Drawing
from lightning_mvar.training.datamodules import TokenDataModule

SAMPLE = ["sample", "--ckpt_path", "model", "--per_class", "2", "--batch_size", "3", "--guidance", "0.5"]
SAMPLE += ["--device", "cpu"]
SHARD_SIZE = 6  # 20 samples make four shards


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Path:
    """Working directory with a network of ten classes in `model`; sets have shards of `SHARD_SIZE`."""
    save_folder(tmp_path / "model", tokenizer, tiny_network(), [f"class {i}" for i in range(10)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_sets, "MIN_SHARD_SIZE", SHARD_SIZE)
    return tmp_path


def samples(folder: str) -> Pack:
    source = LocalShards(Path(folder))
    manifest = source.manifest()
    return read_samples(manifest, source.fetch, [*range(manifest.num_samples)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("network", [{}, {"mixers": MIXERS["var"], "prediction": "token"}], ids=str)
def test_tokens_are_those_that_generate_draws_with_the_same_keys(
    workdir: Path, tokenizer: Tokenizer, network: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(workdir / "model", tokenizer, tiny_network(**network), [f"class {i}" for i in range(10)])
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "decode_features", None)  # no image is decoded
        assert run([*SAMPLE, "--tokens", "own", "--seed", "7", "--classes", "class 3,5,class 9"]) == 0
    own = samples("own")
    assert own.keys == ["000000", "000002", "000004", "000001", "000003", "000005"]  # balanced, wherever it is cut
    assert own.labels.tolist() == [3, 5, 9, 3, 5, 9]
    keys = image_keys(7, [0, 2, 4, 1, 3, 5])
    arguments = {"guidance": 0.5, "generator": keys, "return_tokens": True}
    _, tokens = generate(*load_trained("model")[:2], torch.from_numpy(own.labels), **arguments)
    assert own.tokens.tolist() == tokens.tolist()


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_the_images_are_those_that_are_drawn_without_tokens(workdir: Path, tokenizer: Tokenizer, name: str) -> None:
    from lightning_mvar.sampling.readers import open_samples

    assert run([*SAMPLE, "--out", f"alone{Path(name).suffix}"]) == 0
    assert run([*SAMPLE, "--tokens", "own", "--out", name, "--grid", "grid.png"]) == 0
    alone, images, own = open_samples(f"alone{Path(name).suffix}"), open_samples(name), samples("own")
    assert images.metadata == alone.metadata
    for tokens, key in zip(own.tokens, own.keys, strict=True):
        decoded = to_uint8((tokenizer.decode(torch.from_numpy(tokens.astype(np.int64))[None]) + 1) / 2)[0]
        for pixels in (images.pixels(int(key)), alone.pixels(int(key))):
            assert np.abs(pixels.astype(int) - decoded).max() <= 1  # batches differ in rounding
    assert run([*SAMPLE, "--tokens", "own", "--out", name]) == 0  # complete: nothing to draw


def test_an_interrupted_set_is_completed_and_keeps_its_shards(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run([*SAMPLE, "--tokens", "whole"]) == 0
    draw_tokens, drawn = Drawing.draw_tokens, []

    def draw_until_interrupted(self, labels, numbers):  # type: ignore[no-untyped-def]
        if len(drawn) == 9:  # one shard, and half of another one
            raise KeyboardInterrupt
        drawn.extend(numbers)
        return draw_tokens(self, labels, numbers)

    monkeypatch.setattr(Drawing, "draw_tokens", draw_until_interrupted)
    assert run([*SAMPLE, "--tokens", "own"]) == 130
    first = Path("own/000000.tar").stat().st_mtime_ns
    drawn = []
    assert run([*SAMPLE, "--tokens", "own"]) == 130
    assert Path("own/000000.tar").stat().st_mtime_ns == first
    monkeypatch.setattr(Drawing, "draw_tokens", draw_tokens)
    Path("own/000001.tar").write_bytes(b"damaged")
    assert run([*SAMPLE, "--tokens", "own"]) == 0
    assert contents(Path("own")) == contents(Path("whole"))


def die_in_second_shard(rank: int) -> None:
    """Kills rank 1 with one shard left to it."""
    from lightning_mvar.data.tokens.writing import ShardFolder

    token_sets.MIN_SHARD_SIZE = SHARD_SIZE
    write = ShardFolder.write

    def write_or_die(self, index, *rest):  # type: ignore[no-untyped-def]
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, index, *rest)

    ShardFolder.write = write_or_die


def test_what_two_processes_draw_until_a_kill_is_continued_by_one(workdir: Path) -> None:
    assert run([*SAMPLE, "--tokens", "one"]) == 0
    both = start([*SAMPLE, "--tokens", "two"], workdir, 2, die_in_second_shard, option="--devices")
    assert both.wait() == [1, -signal.SIGKILL], both.printed()
    assert not Path("two/000003.tar").exists()
    assert run([*SAMPLE, "--tokens", "two"]) == 0
    assert contents(Path("two")) == contents(Path("one"))


def test_training_and_scores_take_samples(workdir: Path, tokenizer_folder: Path) -> None:
    assert run([*SAMPLE, "--tokens", "own"]) == 0
    assert run(["shards", "verify", "own", "--tokenizer", str(tokenizer_folder)]) == 0
    module = make_module(tokenizer_folder)
    make_trainer(workdir, 1).fit(module, TokenDataModule("own", "own", batch_size=16))
    assert module.global_step == 1
    assert run([*SAMPLE, "--out", "set.npz"]) == 0
    score = ["evaluate", "--samples", "set.npz", "--reference", "own", "--tokenizer", str(tokenizer_folder)]
    assert run([*score, "--extractor", "conftest.Pixels", "--device", "cpu", "--json", "scores.json"]) == 0
    (scores,) = json.loads(Path("scores.json").read_text())
    assert scores["frechet_distance"] < 1e-3  # the same images


def test_a_set_is_not_continued_with_other_settings_or_another_network(
    workdir: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [*SAMPLE, "--tokens", "own"]
    assert run(command) == 0
    before = contents(Path("own"))
    save_folder(workdir / "other", tokenizer, tiny_network(depth=1))
    for options, difference in (
        (["--seed", "1"], "seed 0, not 1"),
        (["--per_class", "3"], "per_class 2, not 3"),
        (["--classes", "0,2"], "classes all, not 0,2"),
        (["--precision", "bfloat16"], "dtype float32, not bfloat16"),
        (["--ckpt_path", "other"], "network "),
    ):
        assert run([*command, *options]) == 1
        message = capfd.readouterr().err
        assert f"own holds samples drawn with other settings ({difference}" in message
        assert "choose another --tokens, or remove that folder" in message
    assert contents(Path("own")) == before


def test_invalid_folders_and_options_are_refused(
    workdir: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    write_token_shards(workdir / "shards", tokenizer.fingerprint(), [20])
    Path("file").write_text("")
    before = contents(Path("shards"))
    for options, message in (
        ([], "nothing to write: add --out NAME.npz or FOLDER for images, --tokens FOLDER for tokens, or both"),
        (["--tokens", "file"], "--tokens file is a file; name a folder"),
        (["--tokens", "model"], "model holds other files: choose another --tokens or remove that folder"),
        (["--tokens", "shards"], "shards holds shards of images, 'test': choose another --tokens"),
        (["--tokens", "own", "--out", "own"], "--tokens and --out are both own: choose two different paths"),
        (["--tokens", "own", "--grid", "a.png"], "--grid shows images of --out: add --out, or drop --grid"),
        (["--tokens", "own", "--strip", "a.png"], "--strip shows images of --out: add --out, or drop --strip"),
        (["--tokens", "own", "--reject", "conftest.Brightness"], "drop --reject or --tokens"),
        (["--tokens", "own", "--smooth"], "--smooth mixes codes, so its images have no tokens"),
        (["--tokens", "own", "--classes", "unconditional"], "--tokens needs classes: remove mixes and `unconditional`"),
    ):
        assert run([*SAMPLE, *options]) == 1, options
        assert message in capfd.readouterr().err
        assert not Path("own").exists()
    assert contents(Path("shards")) == before


def test_networks_without_class_names_get_those_of_their_labels(workdir: Path, tokenizer: Tokenizer) -> None:
    save_folder(workdir / "plain", tokenizer, tiny_network())
    assert run(["sample", "--ckpt_path", "plain", "--tokens", "own", "--classes", "3"]) == 0
    manifest = Manifest.load(Path("own"))
    assert manifest.class_names == [str(label) for label in range(10)]
    assert manifest.tokenizer == tokenizer.fingerprint()
    assert manifest.schedule == SCHEDULE


def test_shards_shows_decodes_and_verifies_samples(
    workdir: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*SAMPLE, "--tokens", "own", "--seed", "5"]) == 0
    assert run(["shards", "info", "own"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines() if " " in line)
    assert rows["source"] == "samples of a network"
    assert (rows["sampling_seed"], rows["sampling_guidance"], rows["sampling_classes"]) == ("5", "0.5", "all")
    decode = ["shards", "decode", "own", "--tokenizer", str(tokenizer_folder), "--out", "own.png", "--n", "2"]
    assert run(decode) == 0
    assert "without originals" not in capfd.readouterr().out
    Path("own/000001.tar").unlink()
    assert run(["shards", "verify", "own"]) == 1
    assert "own/000001.tar: is missing; run the same `lightning-mvar sample` again" in capfd.readouterr().out


def test_tokenize_does_not_continue_samples(
    workdir: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*SAMPLE, "--tokens", "own"]) == 0
    before = contents(Path("own"))
    write_images(workdir / "images", per_class=1)
    assert run(["tokenize", "--images", "images", "--tokenizer", str(tokenizer_folder), "--out", "own"]) == 1
    assert "own holds samples of a network: choose another --out, or remove that folder" in capfd.readouterr().err
    assert contents(Path("own")) == before
