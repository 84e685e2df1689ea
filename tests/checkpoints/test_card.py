"""Tests of model cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import MIXERS, random_image, tiny_network
from huggingface_hub import ModelCard

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import TrainedModel
from lightning_mvar.checkpoints.card import MARK, model_card
from lightning_mvar.errors import InputError
from lightning_mvar.io.fingerprint import fingerprint

NAMES = ["zero", *map(str, range(1, 9)), 'a "nine"']


@pytest.fixture
def model(tokenizer: Tokenizer) -> TrainedModel:
    return TrainedModel(tiny_network(), tokenizer, NAMES)


def write_result(path: Path, **values: object) -> str:
    """Writes a result of `evaluate` and returns its path."""
    path.write_text(json.dumps([{"reference": "digits:test", "extractor": "InceptionV3", **values}]))
    return str(path)


def test_the_hub_reads_the_scores_and_the_license(model: TrainedModel, tmp_path: Path) -> None:
    scores = {"frechet_distance": 3.5512, "frechet_distance_low": 3.4, "frechet_distance_high": 3.7, "recall": 0.5}
    protocol = {"guidance": 1.5, "num_samples": 50_000, "network": fingerprint(model.network)}
    files = [
        write_result(tmp_path / "a.json", **scores, **protocol),
        write_result(
            tmp_path / "b.json",
            frechet_distance=2.0,
            extractor="DINOv2",
            reference="/home/me/faces/",
            guidance_off_from=None,
        ),
    ]
    card = ModelCard(model_card(model, "me/digits", "mit", ("mnist",), tuple(files)).content)
    assert (card.data.license, card.data.datasets, card.data.model_name) == ("mit", ["mnist"], "me/digits")
    indexed = [(r.metric_type, r.metric_value, r.dataset_name) for r in card.data.eval_results]
    assert indexed == [
        ("fid", 3.5512, "digits:test"),
        ("recall", 0.5, "digits:test"),
        ("frechet_distance", 2.0, "faces"),
    ]
    assert card.data.eval_results[0].metric_args == {"num_samples": 50_000, "guidance": 1.5, "extractor": "InceptionV3"}
    assert "| fid | 3.551 (3.4 to 3.7) |\n| recall | 0.5 |\n" in card.text
    assert "num samples 50000; guidance 1.5; extractor InceptionV3\n" in card.text
    assert "\nextractor DINOv2\n" in card.text


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("reference", "~/a/b:val", "b:val"),
        ("reference", "file:///home/me/x.tar", "x.tar"),
        ("reference", "https://host/x.tar?token=1", "x.tar"),
        ("reference", "faces/holdout", "faces/holdout"),
        ("samples", "/home/o'neil/out/", "out"),
        ("extractor_class", "Images(images='/home/me/set/', model=\"/o'neil/x\")", "Images(images='set', model=\"x\")"),
        (
            "extractor_class",
            "Timm(model='timm/a', mixers='mamba2 / none')",
            "Timm(model='timm/a', mixers='mamba2 / none')",
        ),
        ("mixers", "mamba2 / none", "mamba2 / none"),
    ],
)
def test_paths_lose_their_folders(field: str, value: str, expected: str, model: TrainedModel, tmp_path: Path) -> None:
    assert (
        f'"{field}": {json.dumps(expected)}'
        in model_card(model, scores=(write_result(tmp_path / "a.json", **{field: value}),)).content
    )


@pytest.mark.parametrize("family", MIXERS)
def test_the_text_describes_network_and_tokenizer(family: str, tokenizer: Tokenizer) -> None:
    network = tiny_network(mixers=MIXERS[family])
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    card = ModelCard(model_card(TrainedModel(network, tokenizer, NAMES)).content)
    title = {"mvar": "M-VAR", "var": "VAR"}[family]
    assert card.data.tags == ["image-generation", "class-conditional", family]
    assert card.text.startswith(f"{MARK}\n\n# {title} with {count:.1f}M parameters\n")
    for part in ("8 x 8 pixels, 10 classes: zero, 1,", "30 per image, in maps of side 1, 2, 3, 4", "48 codes"):
        assert part in card.text
    assert 'pipe("zero")[0]' in card.text
    assert f"2 blocks of {network.config.mixer_summary}, width" in card.text
    assert "license: not stated" in card.text
    assert "Scores" not in card.text


def test_an_edited_card_is_kept(model: TrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_image().save(tmp_path / "grid.PNG")
    path, card = tmp_path / "export/README.md", model_card(model, picture=str(tmp_path / "grid.PNG"))
    for _ in range(2):
        card.save(path)
    assert path.read_text() == card.content
    assert "![samples](samples.png)" in card.content
    assert path.with_name("samples.png").read_bytes() == (tmp_path / "grid.PNG").read_bytes()
    for mine in (b"mine", "né".encode("latin-1")):
        path.write_bytes(mine)
        card.save(path)
        assert path.read_bytes() == mine
        assert "is kept: it was edited" in caplog.text
        caplog.clear()
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"README\.md is not a regular file"):
        card.save(path)


def test_what_is_not_of_this_network_is_refused(model: TrainedModel, tmp_path: Path) -> None:
    other = write_result(tmp_path / "other.json", network="0123456789abcdef")
    with pytest.raises(InputError, match=r"other\.json has the scores of network 0123456789abcdef, but this one is"):
        model_card(model, scores=(other,))
    (tmp_path / "bench.json").write_text('[{"images_per_s": 3.0}]')
    with pytest.raises(InputError, match=r"bench\.json has no scores"):
        model_card(model, scores=(str(tmp_path / "bench.json"),))
    with pytest.raises(InputError, match="repository digits has no owner: use OWNER/digits"):
        model_card(model, "digits")
    for picture in ("missing.png", "bench.json"):
        with pytest.raises(InputError, match=f"{picture} is not a picture file"):
            model_card(model, picture=str(tmp_path / picture))
