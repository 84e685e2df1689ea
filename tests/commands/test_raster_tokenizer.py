"""A tokenizer of one scale, whose tokens form a raster, in all commands that take a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mvar.checkpoints import load_tokenizer
from lightning_mvar.cli import run
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.data.tokens.manifest import Manifest
from lightning_mvar.data.tokens.shards import read_shard
from lightning_mvar.metrics.classifiers.photos import PhotosClassifier
from lightning_mvar.metrics.reference import open_reference

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = [f"--config={ROOT}/experiment/digits_tokenizer.yaml", f"--config={ROOT}/data/digits_raster_tokenizer.yaml"]
SHORT = [
    *("--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"),
    *("--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--data.batch_size=16"),
    *("--model.revive_every=2", "--model.tokenizer.channels=8", "--trainer.default_root_dir=tok"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer trained for a few steps, and tokens of the test photos."""
    root = tmp_path_factory.mktemp("raster")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(["train-tokenizer", *CONFIGS, *SHORT]) == 0
        tokenize = ["tokenize", "--images", "photos:test", "--tokenizer", "tok", "--device", "cpu"]
        assert run([*tokenize, "--out", "shards"]) == 0
        assert run([*tokenize, "--out", "views", "--views", "2"]) == 0
        PhotosClassifier("kept/photos_classifier.safetensors", epochs=1).load_or_train()
    return root


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


def test_training_logs_the_single_scale(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("tok/logs")
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"val/l2", "val/codebook_usage", "codebook_usage/8"} <= set(scalars)
    assert [tag for tag in scalars if tag.startswith("codebook_usage/")] == ["codebook_usage/8"]
    assert all(np.isfinite(event.value) for tag in scalars for event in events.Scalars(tag))
    assert "reconstructions" in events.Tags()["images"]


@torch.no_grad()
def test_shards_hold_a_raster_of_64_tokens_per_photo(here: Path) -> None:
    tokenizer, manifest = load_tokenizer("tok"), Manifest.load(Path("shards"))
    source = open_images("photos:test", 32)
    assert (manifest.side_lengths, manifest.num_images, manifest.class_names) == ([8], 450, source.class_names)
    (pack,) = (p for shard in manifest.shards for p in read_shard(Path("shards") / shard.name, shard, manifest.spec))
    assert pack.tokens.shape == (450, 64)
    indices = [int(key.removeprefix("photos/test/")) for key in pack.keys[:40]]
    images = torch.stack([source[index].image for index in indices])
    features = tokenizer.features(images)  # (b, c, 8, 8)
    codes = tokenizer.quantizer.codebook.weight
    nearest = torch.cdist(features.permute(0, 2, 3, 1).reshape(-1, codes.shape[1]), codes).argmin(dim=1)
    assert np.array_equal(pack.tokens[:40], nearest.view(40, 64).numpy())
    assert pack.labels[:40].tolist() == [source[index].label for index in indices]
    assert Manifest.load(Path("views")).num_samples == 900


@torch.no_grad()
def test_a_raster_is_decoded_and_scored(here: Path) -> None:
    tokenizer = load_tokenizer("tok")
    images = next(open_reference("photos:test").images(32).batches(0, 8)) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokenizer.scale_inputs(tokens).shape == (8, 0, 16)
    (step,) = tokenizer.decode_steps(tokens)
    assert torch.equal(step, tokenizer.decode(tokens))
    command = ["reconstruct", "--tokenizer", "tok", "--images", "photos:test", "--cache", "kept", "--device", "cpu"]
    assert run([*command, "--json", "scores.json", "--picture", "pairs.png"]) == 0
    (record,) = json.loads(Path("scores.json").read_text())
    assert record["extractor"] == "PhotosClassifier"
    assert record["num_images"] == 450
    assert record["frechet_distance"] > 0
    assert 0 < record["codebook_usage"] <= 1
