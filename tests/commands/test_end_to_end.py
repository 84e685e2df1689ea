"""Runs each subcommand on real files, from a folder of images to a tokenizer, shards, a network and samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES
from PIL import Image
from stages import FIT_YAML, TOKENIZER_YAML, run_stages, tags

from lightning_mvar.checkpoints import load_tokenizer, load_trained
from lightning_mvar.cli import run
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.shards import read_shard


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command line has run all stages."""
    return run_stages(tmp_path_factory.mktemp("workspace"), TOKENIZER_YAML, FIT_YAML)


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


def test_tokenizer_training_leaves_a_folder_and_its_curves(here: Path) -> None:
    assert load_tokenizer("tok").config.shape == (8, 8)
    scalars, images = tags(here / "tok/logs")
    assert {"train/loss", "train/lr", "train/grad_norm", "val/l2", "val/codebook_usage", "perf/images_per_s"} <= scalars
    assert {f"codebook_usage/{side}" for side in (1, 2, 4)} <= scalars
    assert images == {"reconstructions"}


def test_a_second_training_refuses_to_overwrite_a_tokenizer(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (here / "tok").rglob("*") if path.is_file()}
    assert run(["train-tokenizer", "--config", "tokenizer.yaml"]) == 1
    assert "tok holds a finished tokenizer: continue its training with --resume, replace" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in (here / "tok").rglob("*") if path.is_file()} == before


def test_shards_hold_the_tokens_of_each_image(here: Path) -> None:
    from lightning_mvar.data.images.sources import open_images

    manifest = Manifest.load(here / "shards/train")
    assert [shard.samples for shard in manifest.shards] == [7, 7, 4]
    assert manifest.class_names == CLASSES
    assert manifest.tokenizer == load_tokenizer("tok").fingerprint()
    source, tokenizer = open_images("images", 8), load_tokenizer("tok")
    expected = {source[i].key: source[i] for i in range(len(source))}
    seen = set()
    for shard in manifest.shards:
        for pack in read_shard(here / "shards/train" / shard.name, shard, manifest.spec):
            for tokens, label, key in zip(*pack, strict=True):
                example = expected[key]
                assert example.label == label
                assert example.image is not None
                with torch.no_grad():
                    expected_tokens = tokenizer.encode(example.image[None])[0]
                np.testing.assert_array_equal(tokens, expected_tokens.numpy())
                seen.add(key)
    assert seen == set(expected)


def test_fit_logs_the_promised_tags_and_checkpoints(here: Path) -> None:
    scalars, images = tags(here / "run/logs")
    names = ["loss", "loss_last_scale", "acc", "acc_last_scale"]
    promised = {f"{stage}/{name}" for stage in ("train", "val") for name in names}
    promised |= {"train/grad_norm", "train/lr", "train/weight_decay", "perf/images_per_s", "val/fid"}
    promised |= {"scale_loss/1", "scale_loss/2", "scale_loss/4", "val/frechet_Pixels"}
    assert promised <= scalars
    assert images == {"samples", "strip"}
    assert (here / "run/checkpoints/last.ckpt").is_file()


def test_validate_and_test_run_from_a_checkpoint(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("validate", "test"):
        assert run([command, "--config", "fit.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]) == 0
        name = {"validate": "val", "test": "test"}[command]
        assert f"{name}/loss_last_scale" in capfd.readouterr().out


def test_export_holds_the_checkpoints_weights(here: Path) -> None:
    exported, trained = load_trained("export"), load_trained("run/checkpoints/last.ckpt")
    assert exported.class_names == trained.class_names == CLASSES
    assert exported.tokenizer.fingerprint() == trained.tokenizer.fingerprint()
    weights = trained.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in exported.network.state_dict().items())


def test_sample_writes_npz_grid_and_strip(here: Path) -> None:
    options = ["--per_class", "3", "--seed", "1", "--grid", "grid.png", "--strip", "strip.png"]
    assert run(["sample", "--ckpt_path", "export", "--out", "samples.npz", *options]) == 0
    with np.load("samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.shape, images.dtype) == ((9, 8, 8, 3), np.uint8)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with Image.open("grid.png") as grid, Image.open("strip.png") as strip:
        assert grid.height == strip.height == 3 * 10 + 2  # 3 classes down
        pixels, steps = np.asarray(grid)[:, -32:], np.asarray(strip)[:, -32:]  # 3 images, 3 scales across; names before
    np.testing.assert_array_equal(pixels[2:10, 2:10], images[0])
    np.testing.assert_array_equal(steps[2:10, -10:-2], images[0])
    assert run(["sample", "--ckpt_path", "run/checkpoints/last.ckpt", "--out", "again.npz", "--per_class", "3",
                "--seed", "1", "--batch_size", "2"]) == 0  # fmt: skip
    with np.load("again.npz") as arrays:
        difference = np.abs(arrays["arr_0"].astype(int) - images)
    assert difference.max() <= 1  # of 255: another batch size may round differently


def test_sample_writes_class_folders_of_chosen_classes(here: Path) -> None:
    options = ["--classes", "light,0", "--per_class", "2", "--smooth", "true", "--guidance", "0"]
    assert run(["sample", "--ckpt_path", "export", "--out", "pngs", *options]) == 0
    assert sorted(str(path.relative_to("pngs")) for path in Path("pngs").rglob("*.png")) == [
        "dark/000002.png",
        "dark/000003.png",
        "light/000000.png",
        "light/000001.png",
    ]


def test_tokenize_resumes_where_it_stopped(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If one shard is lost and one truncated, only those are rewritten, with the same content as before."""
    shutil.copytree("shards/train", "shards/resumed")
    folder = Path("shards/resumed")
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    (folder / "000000.tar").unlink()
    (folder / "000001.tar").write_bytes(before["000001.tar"][:999])
    untouched = (folder / "000002.tar").stat().st_mtime_ns
    command = ["tokenize", "--images", "images", "--tokenizer", "tok", "--out", "shards/resumed", "--shard_size", "7"]
    assert run(command) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before
    assert (folder / "000002.tar").stat().st_mtime_ns == untouched
    assert Manifest.load(folder) == Manifest.load(Path("shards/train"))
    command[-1] = "8"
    assert run(command) == 1
    assert "holds shards of other images, another tokenizer, or other --views" in capfd.readouterr().err


def test_several_views_per_image(here: Path) -> None:
    command = ["tokenize", "--images", "images", "--tokenizer", "tok", "--out", "shards/views", "--shard_size", "20"]
    assert run([*command, "--views", "3", "--seed", "5"]) == 0
    folder, manifest = Path("shards/views"), Manifest.load(Path("shards/views"))
    assert (manifest.num_samples, manifest.num_images, manifest.views, manifest.seed) == (54, 18, 3, 5)
    assert [shard.samples for shard in manifest.shards] == [20, 20, 14]
    packs = [pack for shard in manifest.shards for pack in read_shard(folder / shard.name, shard, manifest.spec)]
    keys = [key for pack in packs for key in pack.keys]
    assert sorted(keys) == sorted(f"{c}/{i}.png#{view}" for c in CLASSES for i in range(6) for view in range(3))
    assert len({pack.tokens[row].tobytes() for pack in packs for row in range(len(pack.tokens))}) > 18
    before = (folder / "000001.tar").read_bytes()
    (folder / "000001.tar").unlink()
    assert run([*command, "--views", "3", "--seed", "5"]) == 0
    assert (folder / "000001.tar").read_bytes() == before


def test_tokenize_skips_or_refuses_corrupt_images(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("images", "damaged")
    Path("damaged/light/3.png").write_bytes(Path("images/light/3.png").read_bytes()[:60])
    command = ["tokenize", "--images", "damaged", "--tokenizer", "tok", "--out", "shards/damaged"]
    assert run(command) == 1
    assert "damaged/light/3.png cannot be decoded" in capfd.readouterr().err
    assert not list(Path("shards").glob("damaged/*.tar"))
    assert run([*command, "--max_failures", "1"]) == 0
    captured = capfd.readouterr()
    assert "17 samples in 1 shard " in captured.out
    assert "1 image skipped" in captured.out
    manifest = Manifest.load(Path("shards/damaged"))
    assert manifest.num_samples == 17
    assert "light/3.png" in manifest.skipped[0]
    assert run([*command, "--max_failures", "1", "--views", "2", "--out", "shards/damaged_views"]) == 0
    manifest = Manifest.load(Path("shards/damaged_views"))
    assert (manifest.num_samples, len(manifest.skipped)) == (34, 1)  # reported once for all views


def test_a_corrupt_image_counts_once_even_if_its_folder_is_moved(here: Path) -> None:
    shutil.copytree("images", "first_place")
    Path("first_place/light/3.png").write_bytes(b"no picture")
    options = ["--tokenizer", "tok", "--out", "shards/moved", "--max_failures", "1", "--views", "9"]
    options += ["--shard_size", "40"]
    assert run(["tokenize", "--images", "first_place", *options]) == 0
    folder = Path("shards/moved")
    reporting_shards = [shard for shard in Manifest.load(folder).shards if shard.skipped]
    assert len(reporting_shards) > 1
    (folder / reporting_shards[0].name).unlink()
    Path("first_place").rename("second_place")
    assert run(["tokenize", "--images", "second_place", *options]) == 0
    assert len({message for shard in Manifest.load(folder).shards for message in shard.skipped.values()}) == 2
    assert len(Manifest.load(folder).skipped) == 1
