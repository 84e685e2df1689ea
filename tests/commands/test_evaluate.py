"""Scores of samples, wherever they are, and of a checkpoint; by one process and by two; killed and continued."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pixels, tiny_network, write_images, write_token_shards
from PIL import Image
from processes import start

from lightning_mvar import Tokenizer, generate
from lightning_mvar.checkpoints import load_trained, save_folder
from lightning_mvar.cli import run
from lightning_mvar.data.builtin.photos import PHOTOS
from lightning_mvar.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_mvar.metrics.image_sets import open_image_set
from lightning_mvar.metrics.photos import PhotosClassifier
from lightning_mvar.metrics.reference import measure
from lightning_mvar.sampling.generate import image_generators

SCORES = ("frechet_distance", "precision", "recall")
AGAINST = ["--reference", "images", "--extractor", "conftest.Pixels", "--device", "cpu"]
DRAWING = ["--per_class", "3", "--batch_size", "4", "--guidance", "0.5"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Path:
    """A network of ten classes in `model`, its tokenizer in `tok`, real pictures in `images`."""
    save_folder(tmp_path / "model", tokenizer, tiny_network())
    save_folder(tmp_path / "tok", tokenizer)
    write_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scored(samples: str, *options: str) -> dict[str, Any]:
    assert run(["evaluate", "--samples", samples, *AGAINST, *options, "--json", "scores.json"]) == 0
    (record,) = json.loads(Path("scores.json").read_text())
    return record


def test_a_checkpoint_its_npz_and_its_folder_have_the_same_scores(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn = scored("set.npz", "--ckpt_path", "model", *DRAWING)
    table = capfd.readouterr().out
    assert all(name in table for name in drawn)
    assert (drawn["num_samples"], drawn["guidance"], drawn["seed"], drawn["top_k"]) == (30, 0.5, 0, 900)
    assert drawn.pop("images_per_s") > 0  # how fast it drew, which is no score
    assert scored("set.npz") == drawn
    assert scored("set.npz", "--ckpt_path", "model", *DRAWING) == drawn  # all there already
    assert run(["sample", "--ckpt_path", "model", "--out", "set", *DRAWING]) == 0
    folder = scored("set")
    assert {name for name in drawn if folder[name] != drawn[name] and name not in SCORES} == {"samples"}
    assert all(folder[name] == pytest.approx(drawn[name], rel=1e-9) for name in SCORES)


def test_scores_are_those_of_a_plain_loop(here: Path) -> None:
    found = scored("set.npz", "--ckpt_path", "model", *DRAWING)
    network, tokenizer, _ = load_trained("model")
    metric = FeatureStatistics(4)
    for number in range(30):
        label = torch.tensor([number // 3])
        image = generate(network, tokenizer, label, guidance=0.5, generator=image_generators(0, [number]))
        metric.update(Pixels()((image * 255).round() / 255))
    real = measure(Pixels(), open_image_set("images", 8), "").statistics
    assert found["frechet_distance"] == pytest.approx(frechet_distance(real, metric.compute()), rel=1e-3)


def test_by_default_fifty_of_each_class_are_drawn_as_for_published_scores(here: Path) -> None:
    record = scored("set.npz", "--ckpt_path", "model")
    assert record["num_samples"] == 500
    assert [record[name] for name in ("per_class", "guidance", "top_k", "top_p")] == [50, 1.5, 900, 0.96]


def test_killed_and_started_again_on_two_devices_the_scores_are_the_same(here: Path) -> None:
    expected = scored("whole.npz", "--ckpt_path", "model", *DRAWING, "--per_class", "20")
    command = ["evaluate", "--samples", "set.npz", "--ckpt_path", "model", *AGAINST, *DRAWING, "--per_class", "20"]
    killed = start([*command, "--cache", "first"], here, devices=2, option="--devices")
    for _ in range(600):
        if len([*here.glob("set.npz.partial/*.npz")]) > 3:
            break
        time.sleep(0.05)
    killed.send(signal.SIGKILL)
    assert not Path("set.npz").exists()
    again = start([*command, "--cache", "second", "--json", "again.json"], here, devices=2, option="--devices")
    assert again.wait() == [0, 0], again.printed()
    (found,) = json.loads(Path("again.json").read_text())
    for name in SCORES:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    assert found["num_samples"] == 200


def test_samples_of_other_projects_need_neither_labels_nor_classes(here: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    np.savez("theirs.npz", pixels)
    Path("flat").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"flat/{i:06d}.png")
    first, second = scored("theirs.npz"), scored("flat")
    assert all(first[name] == pytest.approx(second[name], rel=1e-9) for name in SCORES)
    assert "guidance" not in first


def test_a_set_against_itself_is_at_distance_0_and_a_floor_relates_distances(here: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez("a.npz", pixels[:30])
    np.savez("b.npz", pixels[10:])
    record = scored("a.npz", "--reference", "a.npz", "--floor", "b.npz")
    assert record["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert record["precision"] == record["recall"] == 1
    assert record["floor_frechet_distance"] > 0


def test_references_are_images_shards_or_statistics(here: Path, tokenizer: Tokenizer) -> None:
    write_token_shards(here / "shards", tokenizer.fingerprint(), [20, 12])
    np.savez("a.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8))
    measured = scored("a.npz", "--reference", "shards", "--tokenizer", "tok", "--statistics", "own.npz")
    known = scored("a.npz", "--reference", "own.npz")
    assert all(known[name] == pytest.approx(measured[name], rel=1e-9) for name in SCORES)
    record = scored("a.npz", "--reconstructions", "tok")
    assert record["reconstruction_frechet_distance"] > 0


def test_few_samples_are_warned_of_with_the_consequence(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.savez("few.npz", np.zeros((4, 8, 8, 3), np.uint8))
    scored("few.npz")
    said = capfd.readouterr().err
    assert "warning: 4 samples for 4 features: their covariance is singular, so that the Frechet distance" in said
    np.savez("more.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8))
    scored("more.npz")
    assert "warning" not in capfd.readouterr().err


def test_digits_of_one_class_or_none_are_scored_without_the_machines_that_read_them(here: Path) -> None:
    rng = np.random.default_rng(0)
    against = ["--reference", "digits:test", "--extractor", "conftest.Pixels"]
    for labels in (np.full(30, 3), np.full(30, 10)):
        np.savez("a.npz", arr_0=rng.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8), arr_1=labels)
        record = scored("a.npz", *against)
        assert record["frechet_distance"] > 0
        assert record.keys() & {"svm_accuracy_on_reference", "svm_accuracy_on_samples"} == {"svm_accuracy_on_reference"}


def test_photos_are_scored_and_read_by_their_own_classifier(here: Path) -> None:
    """Real training patches as samples: at the floor, and read as the classifier reads them, whatever their names."""
    classifier = PhotosClassifier("cache/photos_classifier.safetensors", epochs=4)
    images, labels = PHOTOS.load("train")
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    against = ["--reference", "photos:test", "--device", "cpu", "--cache", "cache", "--json", "scores.json"]
    for shift in (0, 1):
        np.savez("a.npz", arr_0=pixels, arr_1=(labels.numpy() + shift) % 10)
        assert run(["evaluate", "--samples", "a.npz", *against, "--floor", "photos:train"]) == 0
        (record,) = json.loads(Path("scores.json").read_text())
        read = classifier.classify((images + 1) / 2)
        assert record["classifier_accuracy_on_samples"] == pytest.approx(
            float((read == (labels + shift) % 10).float().mean()), abs=1e-3
        )
    assert record["extractor"] == "PhotosClassifier"
    assert record["frechet_distance_over_floor"] == pytest.approx(1, abs=1e-3)
    assert record["inception_score"] > 3
    assert 0 < record["recall"] <= 1
    assert not any(name.startswith("svm") for name in record)
    real, truth = PHOTOS.load("test")
    expected = (classifier.classify((real + 1) / 2) == truth).float().mean()
    assert record["classifier_accuracy_on_reference"] == pytest.approx(float(expected))


def test_a_file_cannot_say_other_things_of_its_scores_than_it_is_asked(here: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    np.savez("a.npz", arr_0=pixels, about=np.array(json.dumps({"samples": "others", "num_samples": 5, "seed": 3})))
    record = scored("a.npz")
    assert (record["samples"], record["num_samples"], record["seed"]) == ("a.npz", 30, 3)


def test_mistakes_are_told_in_a_line(here: Path, capfd: pytest.CaptureFixture[str], tokenizer: Tokenizer) -> None:
    def refused(samples: str, *options: str) -> str:
        capfd.readouterr()
        assert run(["evaluate", "--samples", samples, *options]) == 1
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return captured.err.strip().splitlines()[-1]

    pixels = np.zeros((6, 8, 8, 3), np.uint8)
    assert "nowhere.npz does not exist; write it with" in refused("nowhere.npz", *AGAINST)
    Path("text.npz").write_text("hello")
    assert "text.npz is damaged or not an npz" in refused("text.npz", *AGAINST)
    np.savez("other.npz", images=pixels)
    assert "other.npz has no array arr_0; it holds images" in refused("other.npz", *AGAINST)
    np.savez("floats.npz", arr_0=pixels / 255)
    assert "arr_0 must be uint8 N x H x W x 3, got float64 6 x 8 x 8 x 3" in refused("floats.npz", *AGAINST)
    np.savez("one.npz", arr_0=pixels[:1])
    assert "1 samples: a distance needs at least 2" in refused("one.npz", *AGAINST)
    np.savez("good.npz", arr_0=pixels)
    assert "--extractor is needed" in refused("good.npz", "--reference", "images")
    assert "digits:test are 32 x 32" in refused("good.npz", "--reference", "digits:test", "--cache", "cache")
    inception = ["--reference", "images", "--extractor", "InceptionV3", "--extractor.weights", "nowhere.pth"]
    assert refused("good.npz", *inception).startswith("lightning-mvar: error: nowhere.pth does not exist; download it")
    np.savez("large.npz", arr_0=np.zeros((6, 16, 16, 3), np.uint8))
    assert "large.npz are 16 x 16, those to be scored 8 x 8" in refused(
        "good.npz", *AGAINST, "--reference", "large.npz"
    )
    write_token_shards(here / "shards", tokenizer.fingerprint(), [4])
    assert "name the tokenizer that decodes them" in refused("good.npz", *AGAINST, "--reference", "shards")
    assert "nowhere does not exist" in refused("new.npz", *AGAINST, "--ckpt_path", "model", "--reference", "nowhere")
    assert "nowhere does not exist" in refused("new.npz", *AGAINST, "--ckpt_path", "model", "--floor", "nowhere")
    np.savez("known.npz", mu=np.zeros(4), sigma=np.eye(4))
    rebuilt = ["--reference", "known.npz", "--reconstructions", "tok"]
    assert "known.npz has their statistics alone" in refused("good.npz", *AGAINST, *rebuilt)
    assert "--statistics own must be NAME.npz" in refused("good.npz", *AGAINST, "--statistics", "own")
    assert "--num_workers must not be negative" in refused("good.npz", *AGAINST, "--num_workers", "-1")
    assert "--guidance is for drawing samples: name a --ckpt_path" in refused("good.npz", *AGAINST, "--guidance", "2")
    assert "no class 'cat'" in refused("new.npz", *AGAINST, "--ckpt_path", "model", "--classes", "cat")
    assert "good.npz holds images that were sampled otherwise" in refused("good.npz", *AGAINST, "--ckpt_path", "model")
    assert not Path("new.npz").exists()
