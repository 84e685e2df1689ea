"""Tests of `evaluate` on samples and checkpoints: with one process and two, and killed and resumed."""

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
from lightning_mvar.metrics.classifiers.photos import PhotosClassifier
from lightning_mvar.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_mvar.metrics.reference import measure, open_reference
from lightning_mvar.sampling.costs import sampling_costs
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.settings import SamplingSettings

SCORES = (
    *("frechet_distance", "kernel_distance", "kernel_distance_std", "mind", "vendi_score"),
    *("precision", "recall", "density", "coverage"),
)
REFERENCE = ["--reference", "images", "--extractor", "conftest.Pixels", "--device", "cpu"]
SAMPLING = ["--per_class", "3", "--batch_size", "4", "--guidance", "0.5"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Path:
    """Working folder with a network of ten classes in `model`, its tokenizer in `tok`, and real images in `images`."""
    save_folder(tmp_path / "model", tokenizer, tiny_network())
    save_folder(tmp_path / "tok", tokenizer)
    write_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate_scores(samples: str, *options: str) -> dict[str, Any]:
    assert run(["evaluate", "--samples", samples, *REFERENCE, *options, "--json", "scores.json"]) == 0
    (record,) = json.loads(Path("scores.json").read_text())
    return record


def test_a_checkpoint_its_npz_and_its_folder_have_the_same_scores(
    workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = evaluate_scores("set.npz", "--ckpt_path", "model", *SAMPLING)
    table = capfd.readouterr().out
    assert all(name in table for name in record)
    assert (record["num_samples"], record["guidance"], record["seed"], record["top_k"]) == (30, 0.5, 0, 900)
    assert record.pop("images_per_s") > 0  # reported only if images were drawn
    assert evaluate_scores("set.npz", "--ckpt_path", "model", *SAMPLING) == record  # no images are missing
    costs = sampling_costs(SamplingSettings(guidance=0.5), load_trained("model").network.config)._asdict()
    assert {name: record.pop(name) for name in costs} == costs
    assert record.pop("weights") == "network"  # known only if there is a checkpoint
    assert evaluate_scores("set.npz") == record
    assert (record["sampled_classes"], record["fewest_per_class"], record["most_per_class"]) == (10, 3, 3)
    real = measure(Pixels(), open_reference("images").images(8), "").statistics
    assert record["reference_mean_norm"] == pytest.approx(float(real.mu.norm()))
    assert record["reference_variance"] == pytest.approx(float(real.sigma.diagonal().sum()))
    assert run(["sample", "--ckpt_path", "model", "--out", "set", *SAMPLING]) == 0
    folder = evaluate_scores("set")
    assert {name for name in record if folder[name] != record[name] and name not in SCORES} == {
        "samples",
        "file_format",
    }
    assert (record["file_format"], folder["file_format"]) == ("NPZ", "PNG")
    assert all(folder[name] == pytest.approx(record[name], rel=1e-9) for name in SCORES)


def test_scores_are_those_of_a_plain_loop(workspace: Path) -> None:
    record = evaluate_scores("set.npz", "--ckpt_path", "model", *SAMPLING)
    network, tokenizer, _ = load_trained("model")
    metric = FeatureStatistics(4)
    for number in range(30):
        label = torch.tensor([number // 3])
        image = generate(network, tokenizer, label, guidance=0.5, generator=image_keys(0, [number]))
        metric.update(Pixels()((image * 255).round() / 255))
    real = measure(Pixels(), open_reference("images").images(8), "").statistics
    assert record["frechet_distance"] == pytest.approx(frechet_distance(real, metric.compute()), rel=1e-3)


def test_the_defaults_are_the_published_protocol(workspace: Path) -> None:
    record = evaluate_scores("set.npz", "--ckpt_path", "model")
    assert record["num_samples"] == 500
    assert [record[name] for name in ("per_class", "guidance", "top_k", "top_p")] == [50, 1.5, 900, 0.96]


def test_a_killed_run_resumed_on_two_devices_has_the_same_scores(workspace: Path) -> None:
    expected = evaluate_scores("uninterrupted.npz", "--ckpt_path", "model", *SAMPLING, "--per_class", "20")
    command = ["evaluate", "--samples", "set.npz", "--ckpt_path", "model", *REFERENCE, *SAMPLING, "--per_class", "20"]
    killed = start([*command, "--cache", "first"], workspace, devices=2, option="--devices")
    for _ in range(600):
        if len([*workspace.glob("set.npz.partial/*.npz")]) > 3:
            break
        time.sleep(0.05)
    killed.send(signal.SIGKILL)
    assert not Path("set.npz").exists()
    resumed = start([*command, "--cache", "second", "--json", "resumed.json"], workspace, devices=2, option="--devices")
    assert resumed.wait() == [0, 0], resumed.printed()
    (record,) = json.loads(Path("resumed.json").read_text())
    for name in SCORES:
        assert record[name] == pytest.approx(expected[name], rel=1e-4), name
    assert record["num_samples"] == 200


def test_samples_of_other_projects_need_neither_labels_nor_classes(workspace: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    np.savez("theirs.npz", pixels)
    Path("flat").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"flat/{i:06d}.png")
    first, second = evaluate_scores("theirs.npz"), evaluate_scores("flat")
    assert all(first[name] == pytest.approx(second[name], rel=1e-9) for name in SCORES)
    assert "guidance" not in first


def test_intervals_and_the_extrapolated_distance_are_reported_beside_the_scores(
    workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    np.savez("theirs.npz", pixels)
    plain, record = (
        evaluate_scores("theirs.npz"),
        evaluate_scores("theirs.npz", "--interval", "0.9", "--extrapolate", "true"),
    )
    assert {name: record[name] for name in plain} == plain
    assert (record["interval"], record["interval_method"]) == (0.9, "jackknife over samples, 20 groups")
    for name in {*SCORES} - {"kernel_distance_std"}:
        assert record[f"{name}_low"] <= record[name] <= record[f"{name}_high"]
    assert record["frechet_distance_extrapolated"] != record["frechet_distance"]
    np.savez("few.npz", pixels[:30])
    assert run(["evaluate", "--samples", "few.npz", *REFERENCE, "--interval", "0.9"]) == 1
    assert "--interval needs at least 40 samples, got 30" in capfd.readouterr().err
    drawn = ["evaluate", "--samples", "new.npz", *REFERENCE, "--ckpt_path", "model", *SAMPLING]
    assert run([*drawn, "--classes", "0,3", "--extrapolate", "true"]) == 1
    assert "--extrapolate needs at least 16 samples for 4 features, got 6" in capfd.readouterr().err
    assert not [*workspace.glob("new*")]  # refused before any is drawn


def test_the_distance_of_a_set_to_itself_is_0_and_the_floor_distance_is_reported(workspace: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez("a.npz", pixels[:30])
    np.savez("b.npz", pixels[10:])
    record = evaluate_scores("a.npz", "--reference", "a.npz", "--floor", "b.npz")
    assert record["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert record["precision"] == record["recall"] == 1
    assert record["floor_frechet_distance"] > 0


def test_the_classes_drawn_worst_are_reported(workspace: Path) -> None:
    """All samples look like the class `light`, whatever their label."""
    pixels = np.random.default_rng(1).integers(80, 170, (18, 8, 8, 3), dtype=np.uint8)
    np.savez("labeled.npz", pixels, np.arange(18) % 3)
    record = evaluate_scores("labeled.npz", "--worst_classes", "2")
    distances = {name: value for name, value in record.items() if name.startswith("frechet_distance_of_")}
    assert distances.keys() == {"frechet_distance_of_dark", "frechet_distance_of_mixed"}
    assert [*distances.values()] == sorted(distances.values(), reverse=True)
    (dark,) = open_reference("images").images(8).batches(0, 6)
    statistics = []
    for images in (dark, torch.from_numpy(pixels[::3]).permute(0, 3, 1, 2) / 255):
        metric = FeatureStatistics(4)
        metric.update(Pixels()(images))
        statistics.append(metric.compute())
    assert distances["frechet_distance_of_dark"] == pytest.approx(frechet_distance(*statistics), rel=1e-6)


def test_broken_pictures_of_the_reference_are_skipped_if_allowed(
    workspace: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    np.savez("a.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8))
    expected = evaluate_scores("a.npz")
    broken = sorted(Path("images").iterdir())[0] / "broken.png"
    broken.write_bytes(b"")
    options = ["--on_corrupt", "skip", "--reconstructions", "tok"]
    record = evaluate_scores("a.npz", *options)
    assert record["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-9)
    assert record["recall"] == expected["recall"]
    assert [line for line in caplog.messages if line.startswith(f"skipped: {broken} cannot be decoded")]
    command = ["evaluate", "--samples", "a.npz", *REFERENCE]
    assert run(command) == 1  # the cached statistics lack a picture
    assert f"{broken} cannot be decoded" in capfd.readouterr().err
    assert run([*command, *options, "--worst_classes", "1"]) == 1
    assert "--worst_classes needs every image of the reference" in capfd.readouterr().err


def test_references_are_images_shards_or_statistics(workspace: Path, tokenizer: Tokenizer) -> None:
    write_token_shards(workspace / "shards", tokenizer.fingerprint(), [20, 12])
    np.savez("a.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8))
    measured = evaluate_scores("a.npz", "--reference", "shards", "--tokenizer", "tok", "--statistics", "own.npz")
    reused = evaluate_scores("a.npz", "--reference", "own.npz")
    assert all(reused[name] == pytest.approx(measured[name], rel=1e-9) for name in SCORES)
    assert measured["crop"] == reused["crop"] == "var"
    record = evaluate_scores("a.npz", "--reconstructions", "tok", "--crop", "adm")
    assert record["reconstruction_frechet_distance"] > 0
    assert record["crop"] == "adm"


@pytest.mark.parametrize("option", ["--reference", "--floor"])
def test_shards_with_other_classes_than_the_network_are_refused(
    workspace: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    write_token_shards(workspace / "shards", tokenizer.fingerprint(), [20])
    command = ["evaluate", *REFERENCE, option, "shards", "--ckpt_path", "named", "--samples", "set.npz", *SAMPLING]
    for names, message in (
        ([*"0123465789"], "class 5 is '5' in the shards and '6' in the model"),
        ([*"abcdefghijk"], "have 10 classes, the model has 11"),
    ):
        save_folder("named", tokenizer, tiny_network(num_classes=len(names)), names)
        assert run(command) == 1
        assert message in capfd.readouterr().err
    assert not Path("set.npz").exists()


def test_few_samples_cause_a_warning(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.savez("few.npz", np.zeros((4, 8, 8, 3), np.uint8))
    evaluate_scores("few.npz")
    stderr = capfd.readouterr().err
    assert "warning: 4 samples for 4 features: the covariance is singular and the Frechet distance is biased" in stderr
    np.savez("more.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8))
    evaluate_scores("more.npz")
    assert "warning" not in capfd.readouterr().err


def test_digits_of_one_or_unknown_classes_are_scored_without_svm(workspace: Path) -> None:
    rng = np.random.default_rng(0)
    options = ["--reference", "digits:test", "--extractor", "conftest.Pixels"]
    for labels in (np.full(30, 3), np.full(30, 10)):
        np.savez("a.npz", arr_0=rng.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8), arr_1=labels)
        record = evaluate_scores("a.npz", *options)
        assert record["frechet_distance"] > 0
        assert record.keys() & {"svm_accuracy_on_reference", "svm_accuracy_on_samples"} == {"svm_accuracy_on_reference"}


def test_photos_are_scored_and_classified_by_their_own_classifier(workspace: Path) -> None:
    """Scores real training patches, whose distance is the floor; half of them have wrong labels."""
    classifier = PhotosClassifier("cache/photos_classifier.safetensors", epochs=4)
    classifier.load_or_train()
    images, labels = PHOTOS.load("train")
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    options = ["--reference", "photos:test", "--device", "cpu", "--cache", "cache", "--json", "scores.json"]
    given = (labels + torch.arange(len(labels)) % 2) % 10
    np.savez("a.npz", arr_0=pixels, arr_1=given.numpy())
    assert run(["evaluate", "--samples", "a.npz", *options, "--floor", "photos:train"]) == 0
    (record,) = json.loads(Path("scores.json").read_text())
    right = classifier.classify((images + 1) / 2) == given
    assert record["classifier_accuracy_on_samples"] == pytest.approx(float(right.float().mean()), abs=1e-3)
    assert record["extractor"] == "PhotosClassifier"
    assert record["frechet_distance_over_floor"] == pytest.approx(1, abs=1e-3)
    assert record["inception_score"] > 3
    assert 0 < record["recall"] <= 1
    assert not any(name.startswith("svm") for name in record)
    test_images, test_labels = PHOTOS.load("test")
    expected = (classifier.classify((test_images + 1) / 2) == test_labels).float().mean()
    assert record["classifier_accuracy_on_reference"] == pytest.approx(float(expected))


def test_metadata_in_a_file_cannot_override_the_record(workspace: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    np.savez("a.npz", arr_0=pixels, about=np.array(json.dumps({"samples": "others", "num_samples": 5, "seed": 3})))
    record = evaluate_scores("a.npz")
    assert (record["samples"], record["num_samples"], record["seed"]) == ("a.npz", 30, 3)


def test_scores_in_the_metadata_of_a_file_are_not_reported(workspace: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    forged = {"spatial_frechet_distance": 0.001, "svm_accuracy_on_samples": 1.0, "frechet_distance_over_floor": 1.0}
    np.savez("forged.npz", arr_0=pixels, about=np.array(json.dumps(forged | {"top_k": 3, "keep": 0.5})))
    record = evaluate_scores("forged.npz")
    assert not set(forged) & set(record)
    assert (record["top_k"], record["keep"]) == (3, 0.5)


def test_a_stray_picture_in_a_drawn_set_is_refused(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "--ckpt_path", "model", "--out", "set", *SAMPLING]) == 0
    Image.new("RGB", (8, 8)).save("set/0/777777.png")
    assert run(["evaluate", "--samples", "set", *REFERENCE, "--ckpt_path", "model", *SAMPLING]) == 1
    assert "error: set holds 31 images, but the set has 30, numbered 0 to 29" in capfd.readouterr().err


def test_mistakes_are_reported_in_one_line(
    workspace: Path, capfd: pytest.CaptureFixture[str], tokenizer: Tokenizer
) -> None:
    def error_of(samples: str, *options: str) -> str:
        capfd.readouterr()
        assert run(["evaluate", "--samples", samples, *options]) == 1
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return captured.err.strip().splitlines()[-1]

    pixels = np.zeros((6, 8, 8, 3), np.uint8)
    assert "--samples nowhere.npz does not exist; it must be images that" in error_of("nowhere.npz", *REFERENCE)
    Path("text.npz").write_text("hello")
    assert "text.npz is damaged or not an npz" in error_of("text.npz", *REFERENCE)
    np.savez("other.npz", images=pixels)
    assert "other.npz has no array arr_0; it holds images" in error_of("other.npz", *REFERENCE)
    np.savez("floats.npz", arr_0=pixels / 255)
    assert "arr_0 must be uint8 N x H x W x 3, got float64 6 x 8 x 8 x 3" in error_of("floats.npz", *REFERENCE)
    np.savez("one.npz", arr_0=pixels[:1])
    assert "1 samples are too few: a Frechet distance needs at least 2" in error_of("one.npz", *REFERENCE)
    np.savez("good.npz", arr_0=pixels)
    assert "--extractor is required for --reference good.npz, which has no" in error_of(
        "good.npz", "--reference", "good.npz"
    )
    for missing in ("--reconstructions", "--ckpt_path"):  # before the classifier of the images is trained
        assert "nowhere" in error_of("good.npz", "--reference", "images", "--cache", "untrained", missing, "nowhere")
    assert not Path("untrained").exists()
    labels = error_of("good.npz", *REFERENCE, "--worst_classes", "1")
    assert "--worst_classes needs samples of known classes, in folders named like those of images" in labels
    statistics = ["--reference", "good.npz", "--extractor", "conftest.Pixels", "--worst_classes", "1"]
    assert "--worst_classes needs a reference with classes" in error_of("good.npz", *statistics)
    assert "digits:test are 32 x 32" in error_of("good.npz", "--reference", "digits:test", "--cache", "cache")
    inception = ["--reference", "images", "--extractor", "InceptionV3", "--extractor.weights", "nowhere.pth"]
    assert error_of("good.npz", *inception).startswith("lightning-mvar: error: nowhere.pth does not exist; download it")
    np.savez("large.npz", arr_0=np.zeros((6, 16, 16, 3), np.uint8))
    assert "large.npz are 16 x 16, but the images to score are 8 x 8" in error_of(
        "good.npz", *REFERENCE, "--reference", "large.npz"
    )
    write_token_shards(workspace / "shards", tokenizer.fingerprint(), [4])
    assert "pass the tokenizer that encoded them as --tokenizer" in error_of(
        "good.npz", *REFERENCE, "--reference", "shards"
    )
    module = ["--extractor", "torch.nn.BatchNorm2d", "--extractor.num_features", "3", "--ckpt_path", "model"]
    assert "BatchNorm2d cannot extract features: for one image it returns shape (1, 3, 8, 8), not (1, 3)" in error_of(
        "new.npz", "--reference", "images", *module
    )
    module[3] = "4"
    assert "BatchNorm2d cannot extract features: it raises RuntimeError for an image of 8 x 8" in error_of(
        "good.npz", "--reference", "images", *module[:4]
    )
    assert "nowhere does not exist" in error_of("new.npz", *REFERENCE, "--ckpt_path", "model", "--reference", "nowhere")
    assert "nowhere does not exist" in error_of("new.npz", *REFERENCE, "--ckpt_path", "model", "--floor", "nowhere")
    np.savez("known.npz", mu=np.zeros(4), sigma=np.eye(4))
    reconstructions = ["--reference", "known.npz", "--reconstructions", "tok"]
    assert "known.npz has only statistics" in error_of("good.npz", *REFERENCE, *reconstructions)
    assert "--statistics own must be NAME.npz" in error_of("good.npz", *REFERENCE, "--statistics", "own")
    assert "--worst_classes must be at least 0" in error_of("good.npz", *REFERENCE, "--worst_classes", "-1")
    np.savez("ids.npz", pixels, [0, 1, 2, 3, 0, 1])
    assert "of the 3 classes of images: arr_1 has classes from 0 to 3" in error_of(
        "ids.npz", *REFERENCE, "--worst_classes", "1"
    )
    assert "--num_workers must be at least 0" in error_of("good.npz", *REFERENCE, "--num_workers", "-1")
    for name, value in (("guidance", "2"), ("per_class", "3"), ("weights", "raw")):
        refused = error_of("good.npz", *REFERENCE, f"--{name}", value)
        assert f"--{name} applies only to sampling: add the --ckpt_path" in refused
    assert "no class 'cat'" in error_of("new.npz", *REFERENCE, "--ckpt_path", "model", "--classes", "cat")
    assert "good.npz holds images that were sampled with other settings" in error_of(
        "good.npz", *REFERENCE, "--ckpt_path", "model"
    )
    other_size = ["--ckpt_path", "model", "--reference", "digits:test"]
    assert "digits:test are 32 x 32" in error_of("new.npz", *REFERENCE, *other_size)
    assert not Path("new.npz").exists()
