"""The JSON schema of configuration files accepts the package's, and names what is wrong in others."""

import json
from pathlib import Path

import pytest
from jsonargparse import get_loader

from lightning_mvar.cli import run

CONFIGS = Path(__file__).parents[2] / "configs"
FOR_TOKENIZER = ("*tokenizer*.yaml", "codebook/*.yaml")


@pytest.mark.parametrize("command", ["fit", "train-tokenizer"])
def test_the_schema_tells_complete_files_and_overlays_from_mistakes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert run([command, "--print_schema"]) == 0
    validator = jsonschema.Draft7Validator(json.loads(capsys.readouterr().out))
    of_tokenizer = {path for pattern in FOR_TOKENIZER for path in CONFIGS.rglob(pattern)}
    others = set(CONFIGS.rglob("*.yaml")) - of_tokenizer - set(CONFIGS.glob("sweep/*")) - set(CONFIGS.glob("base/**/*"))
    complete = {CONFIGS / "base/fit.yaml", CONFIGS / "base/imagenet.yaml"}
    files = of_tokenizer if command == "train-tokenizer" else others | complete
    load = get_loader("yaml")  # which reads 1e-3 as a number, as editors do
    errors = {path: [e.message for e in validator.iter_errors(load(path.read_text()))] for path in files}
    assert len(errors) > 3
    assert not any(errors.values()), errors
    for mistake in ("trainer: {max_stes: 3}", "trainer: {max_steps: many}", "model: {optimizer: {base_lr: [1]}}"):
        assert not validator.is_valid(load(mistake))
    assert validator.is_valid(load("$schema: fit.json\ntrainer.max_steps: 3"))
    callback = (
        "trainer: {callbacks: [{class_path: lightning_mvar.callbacks.FIDCallback, init_args: {num_samples: %s}}]}"
    )
    assert validator.is_valid(load(callback % 300))
    assert not validator.is_valid(load(callback % "many"))
