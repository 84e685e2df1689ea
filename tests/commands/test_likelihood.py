"""`likelihood`: bits per token of given images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SCHEDULE, tiny_network, write_images

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.cli import run
from lightning_mvar.data.images.sources import open_images

NAMES = ["mixed", "dark", "light", *map(str, range(3, 10))]  # not in the order of the class folders


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Path:
    save_folder(tmp_path / "model", tokenizer, tiny_network(), NAMES)
    write_images(tmp_path / "images", per_class=3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("classes", [None, "unconditional"])
def test_bits_are_the_mean_negative_log2_probability_of_all_tokens(
    workdir: Path, tokenizer: Tokenizer, classes: str | None
) -> None:
    command = ["likelihood", "--ckpt_path", "model", "--images", "images", "--batch_size", "4"]
    options = [] if classes is None else ["--classes", classes]
    assert run([*command, *options, "--json", "mean.json", "--each", "each.json"]) == 0
    (record,) = json.loads(Path("mean.json").read_text())
    each = json.loads(Path("each.json").read_text())
    network, source, all_bits = tiny_network(), open_images("images", 8), []
    for i in range(len(source)):
        example = source[i]
        label = 10 if classes else NAMES.index(source.class_names[example.label])
        with torch.no_grad():
            tokens = tokenizer.encode(example.image[None])
            logits = network(torch.tensor([label]), tokenizer.scale_inputs(tokens))[0].double()
        bits = [-math.log2(float(row.softmax(dim=-1)[token])) for row, token in zip(logits, tokens[0], strict=True)]
        assert each[i]["image"] == example.key
        assert each[i]["bits_per_token"] == pytest.approx(sum(bits) / len(bits), rel=1e-4)
        all_bits.append(bits)
    assert record["num_images"] == len(each) == 9
    for k, side in enumerate(SCHEDULE.side_lengths):
        begin, end = SCHEDULE.offsets[k], SCHEDULE.offsets[k] + side * side
        part = [bit for bits in all_bits for bit in bits[begin:end]]
        assert record[f"bits_per_token_scale_{side}"] == pytest.approx(sum(part) / len(part), rel=1e-4)
    assert record["bits_per_token"] == pytest.approx(sum(map(sum, all_bits)) / (9 * SCHEDULE.num_tokens), rel=1e-4)


def test_errors_name_unknown_class_folders_and_damaged_images(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["likelihood", "--ckpt_path", "model", "--images", "images"]
    Path("images/light/0.png").write_text("hello")
    assert run(command) == 1
    assert "images/light/0.png cannot be decoded" in capfd.readouterr().err
    assert run([*command, "--on_corrupt", "skip", "--json", "a.json"]) == 0
    assert json.loads(Path("a.json").read_text())[0]["num_images"] == 8
    Path("images/light").rename("images/bright")
    assert run(command) == 1
    assert "no class 'bright'" in (message := capfd.readouterr().err)
    assert "rename the folder of images, or set one class for all with --classes" in message
