"""`doctor`: which flaw of an evaluation it names, and whether its estimates are those of a plain computation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pixels, write_images
from PIL import Image
from scipy.fft import dctn

from lightning_mvar.analysis.doctor import traces
from lightning_mvar.analysis.doctor.differences import compare
from lightning_mvar.analysis.doctor.estimates import Estimate, ScoredSet, estimate_all
from lightning_mvar.analysis.doctor.published import published_result, read_table
from lightning_mvar.cli import run
from lightning_mvar.data.builtin.photos import PHOTOS
from lightning_mvar.io.fingerprint import fingerprint
from lightning_mvar.metrics.frechet import FeatureStatistics, Statistics, frechet_distance
from lightning_mvar.metrics.reference import open_reference
from lightning_mvar.metrics.summary import prepare
from lightning_mvar.sampling.readers import open_samples
from lightning_mvar.sampling.settings import SamplingSettings

RESULT = {
    **SamplingSettings().metadata(),
    "dtype": "float32",
    "per_class": 50,
    "classes": "all",
    "network": "a1",
    "network_tokenizer": "b2",
    "samples": "samples.npz",
    "reference": "real/reference.npz",
    "crop": "var",
    "extractor": "Features",
    "extractor_class": "package.Features(scale=1)",
    "extractor_weights": "c3",
    "resize": "none",
    "reference_mean_norm": 3.0,
    "reference_variance": 70.0,
    "num_samples": 500,
    "height": 32,
    "width": 32,
    "file_format": "NPZ",
    "sampled_classes": 10,
    "fewest_per_class": 50,
    "most_per_class": 50,
    "weights": "ema",
    "frechet_distance": 12.0,
}


@pytest.mark.parametrize(
    ("flaw", "named"),
    [
        ({"num_samples": 100, "per_class": 10, "fewest_per_class": 10, "most_per_class": 10}, "num_samples"),
        ({"fewest_per_class": 20, "most_per_class": 80}, "balance of classes"),
        ({"sampled_classes": 9}, "sampled_classes"),
        ({"guidance": 0.5}, "guidance"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": 0.9}, "temperature"),
        ({"drafts": 4}, "drafts"),
        ({"reject": "Classifier"}, "rejection"),
        ({"seed": 1}, "seed"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"network": "a2"}, "network"),
        ({"network_tokenizer": "b3"}, "network_tokenizer"),
        ({"height": 64}, "image size"),
        ({"file_format": "JPEG+PNG"}, "compression"),
        ({"compression_traces": "traces of JPEG"}, "compression"),
        ({"crop": "adm", "reference_variance": 60.0}, "crop"),
        ({"reference_variance": 60.0}, "reference"),
        ({"extractor_weights": "c4", "reference_variance": 60.0}, "extractor weights"),
        ({"extractor_class": "package.Features(scale=2)"}, "extractor arguments"),
        ({"extractor": "Others", "extractor_class": "package.Others()", "extractor_weights": "c4"}, "extractor"),
        ({"resize": "bicubic"}, "resize"),
    ],
)
def test_each_flaw_is_named_and_nothing_else(flaw: dict[str, Any], named: str) -> None:
    for pair in ((RESULT, RESULT | flaw), (RESULT | flaw, RESULT)):
        differences, unknown = compare(*pair)
        assert [difference.factor for difference in differences] == [named]
        assert unknown == []


def test_harmless_changes_are_no_differences() -> None:
    moved = {"samples": "b.npz", "reference": "elsewhere/same.npz", "reference_variance": 70.001, "file_format": "PNG"}
    renamed_weights = {"weights": "network"}  # of the same network
    assert compare(RESULT, RESULT | moved | renamed_weights) == ([], [])


@pytest.mark.parametrize(
    ("ours", "theirs", "named"),
    [
        ({"reference": "val"}, {"crop": "adm", "reference_variance": 60.0}, ["reference", "crop"]),
        ({"network": None}, {"network": None, "weights": "raw"}, ["weights"]),  # of networks that may differ
    ],
)
def test_only_what_is_implied_is_left_out(ours: dict[str, Any], theirs: dict[str, Any], named: list[str]) -> None:
    differences, _ = compare(RESULT | ours, RESULT | theirs)
    assert [difference.factor for difference in differences] == named


def test_differences_begin_with_what_matters_most() -> None:
    flaws = {
        "seed": 1,
        "guidance": 3.0,
        "num_samples": 100,
        "extractor_weights": "c4",
        "network": "a2",
        "weights": "raw",
    }
    differences, _ = compare(RESULT, RESULT | flaws)
    names = ["extractor weights", "num_samples", "network", "weights", "guidance", "seed"]
    assert [difference.factor for difference in differences] == names


@pytest.mark.parametrize("reference", ["downloads/VIRTUAL_imagenet256_labeled.npz", "imagenet256"])
def test_a_published_score_is_compared_in_what_its_paper_states(reference: str) -> None:
    ours = RESULT | {
        "reference": reference,
        "crop": "unknown",
        "extractor": "InceptionV3",
        "resize": "TensorFlow 1's bilinear, to 299 x 299",
        "num_samples": 10_000,
        "height": 256,
        "width": 256,
        "sampled_classes": 1000,
        "guidance": 2.0,
    }
    differences, unknown = compare(ours, published_result("var-d16"))
    assert [(d.factor, d.first, d.second) for d in differences] == [
        ("num_samples", 10_000, 50_000),
        ("guidance", 2.0, 1.5),
    ]
    assert {"dtype", "network", "seed"} <= set(unknown)


def test_every_published_row_names_its_source_and_a_plausible_score() -> None:
    for name in read_table().rows:
        row = published_result(name)
        assert row["source"], name
        assert 1 < row["frechet_distance"] < 10, name
        assert row["num_samples"] == 50_000, name
        assert row["unverified"], name
        assert {*row["unverified"]} <= row.keys(), name
    assert published_result("dit-xl-2")["unverified"] == ["crop", "spatial_frechet_distance", "precision", "recall"]


def photos() -> np.ndarray:
    images, _ = PHOTOS.load("test")
    return ((images[:120] + 1) * 127.5).round().byte().movedim(1, -1).numpy()


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def resized_and_back(pixels: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC))


def write_set(path: Path, pixels: np.ndarray) -> Any:
    np.savez(path, arr_0=pixels)
    return open_samples(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda image: image, {}),
        (lambda image: as_jpeg(image, 75), {"compression_traces"}),
        (lambda image: as_jpeg(image, 90), {"compression_traces"}),
        (lambda image: resized_and_back(image, 16), {"sharpness"}),
        (lambda image: image - ((image > 0) & (image % 3 == 0)), {"rounding"}),
        (lambda image: 255 - image, {}),
    ],
)
def test_pixels_tell_of_jpeg_resizing_and_cut_off_decimals(tmp_path: Path, change: Any, expected: set[str]) -> None:
    original = photos()
    sets = write_set(tmp_path / "a.npz", original), write_set(tmp_path / "b.npz", np.stack([*map(change, original)]))
    first, second = dict[str, Any](), dict[str, Any]()
    traces.add_traces(first, second, sets)
    assert (first.keys() | second.keys()) - ({"sharpness"} if "compression_traces" in expected else set()) == set(
        expected
    )
    if "rounding" in expected:
        assert (first["rounding"], second["rounding"]) == ("nearest", "down")
    if "sharpness" in expected:
        assert second["sharpness"] < first["sharpness"]


def test_the_dct_is_orthonormal() -> None:
    assert np.allclose(traces.DCT @ traces.DCT.T, np.eye(8))


@pytest.mark.parametrize("offset", [0, 4])
def test_fine_coefficients_are_those_of_whole_blocks_from_an_offset_on(offset: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 4, (2, 21, 30, 3)).astype(np.uint8)  # no multiples of 8
    shares = []
    for image in pixels @ traces.LUMINANCE:
        for top in range(offset, 21 - 7, 8):
            for left in range(offset, 30 - 7, 8):
                block = dctn(image[top : top + 8, left : left + 8], norm="ortho")
                shares += [abs(block[i, j]) >= traces.ZERO for i in range(8) for j in range(8 - i, 8)]
    assert 0.1 < np.mean(shares) < 0.9
    assert traces.fine_share(pixels, offset) == pytest.approx(np.mean(shares))


def statistics_of(pixels: np.ndarray) -> Statistics:
    """Statistics of the features of images, one by one."""
    metric = FeatureStatistics(4)
    for image in pixels:
        metric.update(Pixels()(torch.from_numpy(image).movedim(-1, 0)[None].float() / 255))
    return metric.compute()


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Working folder with a reference real.npz and its pixels, and 40 samples of four classes and their labels."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    samples = rng.integers(0, 60, (40, 16, 16, 3)) + 50 * labels[:, None, None, None]
    real = rng.integers(0, 255, (50, 16, 16, 3)).astype(np.uint8)
    np.savez("real.npz", arr_0=real)
    np.savez("a.npz", arr_0=samples.astype(np.uint8), arr_1=labels)
    return real, samples.astype(np.uint8)


def scored(name: str, **values: Any) -> ScoredSet:
    result = {"reference": "real.npz", "num_samples": len(open_samples(f"{name}.npz")), "file_format": "NPZ", **values}
    return ScoredSet(
        name, result, open_samples(f"{name}.npz"), prepare(Pixels(), torch.device("cpu")), Path("cache"), 40
    )


def estimates(first: ScoredSet, second: ScoredSet | None, result: dict[str, Any]) -> list[Estimate | str]:
    return [*estimate_all(compare(first.result, result)[0], first, second, (first.result, result))]


def explained(first: ScoredSet, second: ScoredSet | None, result: dict[str, Any]) -> dict[str, float]:
    return {e.factor: e.explains for e in estimates(first, second, result) if isinstance(e, Estimate)}


def test_a_part_of_a_folder_is_at_hand_as_another_reference(
    pair: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scored("a")
    monkeypatch.setattr(ScoredSet, "reference", lambda _, name, crop: statistics_of(pair[name == "pictures:val"]))
    Path("pictures").mkdir()
    expected = frechet_distance(statistics_of(pair[1]), statistics_of(pair[1])) - first.distance
    found = explained(first, None, first.result | {"reference": "pictures:val"})
    assert found["reference"] == pytest.approx(expected)
    assert "reference" not in explained(first, None, first.result | {"reference": "elsewhere:val"})


def test_estimates_are_those_of_a_plain_computation(pair: tuple[np.ndarray, np.ndarray]) -> None:
    real, samples = pair
    reference, full = statistics_of(real), frechet_distance(statistics_of(real), statistics_of(samples))
    first = scored("a", fewest_per_class=10, most_per_class=10)

    def growth(pixels: np.ndarray) -> float:
        return frechet_distance(reference, statistics_of(pixels)) - full

    rows = np.linspace(0, 39, 8).round().astype(int)
    base = first.result
    assert explained(first, None, base | {"num_samples": 8})["num_samples"] == pytest.approx(growth(samples[rows]))
    half = growth(samples[np.linspace(0, 39, 20).round().astype(int)])
    assert explained(first, None, base | {"num_samples": 80})["num_samples"] == pytest.approx(-half / 2)
    jpeg = np.stack([as_jpeg(image, 75) for image in samples])
    assert explained(first, None, base | {"file_format": "JPEG"})["compression"] == pytest.approx(growth(jpeg))
    np.savez("other.npz", arr_0=real // 2)
    other = frechet_distance(statistics_of(real // 2), statistics_of(samples)) - full
    assert explained(first, None, base | {"reference": "other.npz"})["reference"] == pytest.approx(other)
    small = np.stack([resized_and_back(image, 8) for image in samples])
    first.result |= {"height": 16, "width": 16}
    assert explained(first, None, base | {"height": 8, "width": 8})["image size"] == pytest.approx(growth(small))


def test_another_crop_is_that_of_the_reference(pair: tuple[np.ndarray, np.ndarray]) -> None:
    _, samples = pair
    write_images(Path("real"))
    first = scored("a", reference="real", crop="var")
    sets = (open_reference("real", **crop).images(16) for crop in ({}, {"crop": "adm"}, {"margin": 1.0}))
    var, adm, whole = (next(images.batches(0, len(images))).movedim(1, -1).numpy() * 255 for images in sets)
    ours = statistics_of(samples)
    expected = frechet_distance(statistics_of(adm), ours) - frechet_distance(statistics_of(var), ours)
    assert explained(first, None, first.result | {"crop": "adm"})["crop"] == pytest.approx(expected, rel=1e-2)
    expected = frechet_distance(statistics_of(whole), ours) - frechet_distance(statistics_of(var), ours)
    assert explained(first, None, first.result | {"crop": "var-1.0"})["crop"] == pytest.approx(expected, rel=1e-2)


def test_an_unbalanced_set_is_imitated_in_either_direction(pair: tuple[np.ndarray, np.ndarray]) -> None:
    real, samples = pair
    rows = np.r_[0:10, 10:15, 20:25, 30:35]  # 10, 5, 5 and 5 images of the classes
    np.savez("b.npz", arr_0=samples[rows], arr_1=np.repeat(np.arange(4), (10, 5, 5, 5)))
    balanced = scored("a", fewest_per_class=10, most_per_class=10)
    unbalanced = scored("b", fewest_per_class=5, most_per_class=10)
    forwards = explained(balanced, unbalanced, unbalanced.result)
    backwards = explained(unbalanced, balanced, balanced.result)
    assert forwards["balance of classes"] == pytest.approx(-backwards["balance of classes"])
    reference = statistics_of(real)
    chosen = np.concatenate([np.arange(10), *(begin + np.array([0, 2, 4, 7, 9]) for begin in (10, 20, 30))])
    spaced = np.linspace(0, 39, 25).round().astype(int)
    expected = [frechet_distance(reference, statistics_of(samples[rows])) for rows in (chosen, spaced)]
    assert forwards["balance of classes"] == pytest.approx(expected[0] - expected[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"resize": "bicubic", "num_samples": 8}, "different units: see resize"),
        ({"reference": "text.npz"}, "the effect of reference is not estimated: text.npz is damaged"),
    ],
)
def test_what_cannot_be_estimated_is_a_note(
    pair: tuple[np.ndarray, np.ndarray], change: dict[str, Any], text: str
) -> None:
    Path("text.npz").write_text("hello")
    first = scored("a", resize="none")
    (note,) = estimates(first, None, first.result | change)
    assert text in str(note)


def test_sets_without_common_classes_or_with_other_formats_have_no_estimate(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    np.savez("b.npz", arr_0=pair[1], arr_1=np.repeat([7, 8], 20))
    first = scored("a", fewest_per_class=10, most_per_class=10)
    assert explained(first, scored("b"), first.result | {"fewest_per_class": 5}) == {}
    assert explained(first, None, first.result | {"file_format": "WEBP"}) == {}


def test_the_command_scores_again_and_reports(pair: tuple[np.ndarray, np.ndarray], capfd: Any) -> None:
    real, samples = pair
    rows = np.linspace(0, 39, 20).round().astype(int)
    np.savez("b.npz", arr_0=samples[rows])
    for name, pixels in (("a", samples), ("b", samples[rows])):
        record = RESULT | {
            "samples": f"{name}.npz",
            "reference": "real.npz",
            "extractor_weights": fingerprint(Pixels()),
        }
        record["frechet_distance"] = frechet_distance(statistics_of(real), statistics_of(pixels))
        record |= {"num_samples": len(pixels), "frechet_distance_low": 0.0, "frechet_distance_high": 99.0}
        Path(f"{name}.json").write_text(json.dumps([record]))
    options = ["--extractor", "conftest.Pixels", "--device", "cpu", "--json", "report.json"]
    assert run(["doctor", "a.json", "b.json", *options]) == 0
    report = json.loads(Path("report.json").read_text())
    (difference,) = [record for record in report if record["kind"] == "difference"]
    (score,) = [record for record in report if record["kind"] == "score"]
    assert difference["factor"] == "num_samples"
    assert difference["explains"] == pytest.approx(score["change"], rel=1e-4)
    out = capfd.readouterr().out
    assert "num_samples" in out
    assert "intervals overlap for frechet_distance" in out
    Path("b.npz").rename("moved.npz")
    np.savez("a.npz", arr_0=255 - samples)
    assert run(["doctor", "a.json", "b.json", *options]) == 0
    out = capfd.readouterr().out
    assert "b.npz does not exist" in out
    assert "have changed since" in out
    assert run(["doctor", "a.json", "--published", "var-d16", *options]) == 0
    out = capfd.readouterr().out
    assert "arXiv 2404.02905" in out
    assert "- not checked against the source: crop" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.json a.json", "missing.json does not exist"),
        ("a.json", "name two results"),
        ("a.json a.json --published var-d16", "name two results"),
        ("a.json --published var-16", "there are no published scores of 'var-16'; the table has var-d16"),
        ("a.json bench.json", "bench.json is not a result of `evaluate --json`: it has no frechet_distance"),
        ("a.json two.json", "two.json holds 2 results; name one of them, such as two.json#0"),
        ("a.json two.json#2", "two.json holds 2 results; the last is two.json#1"),
        ("a.json list.json", "list.json: the content is {'a': 1}; it must be [an object, ...]"),
        ("a.json null.json", "null.json: the content is None; it must be [an object, ...]"),
        ("a.json empty.json", "empty.json holds no results: write them with `evaluate --json empty.json`"),
        ("a.json text.json", "text.json: num_samples is '500'; it must be an integer of 64 bits; evaluate again with"),
        ("a.json size.json", "size.json: height must be at least 1, got 0"),
        ("crop.json a.json", "crop.json: crop is ['var']; it must be a string without NUL; evaluate again with"),
        (
            "low.json a.json",
            "low.json: mind_low is None; it must be a finite number; evaluate again with --json low.json",
        ),
        ("a.json a.json --max_images 1", "--max_images must be at least 2, got 1"),
        ("a.json two.json#1 --json two.json", "two.json"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {"a": [RESULT], "bench": [{"images_per_s": 1.0}], "two": [RESULT, RESULT], "list": {"a": 1}}
    contents |= {"null": None, "empty": [], "text": [RESULT | {"num_samples": "500"}], "size": [RESULT | {"height": 0}]}
    contents |= {"crop": [RESULT | {"crop": ["var"]}], "low": [RESULT | {"mind_low": None}]}
    for name, content in contents.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    assert run(["doctor", *arguments.split()]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
