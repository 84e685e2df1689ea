"""`demo`: which stages run, with commands replaced by stubs that record their calls."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from lightning_mvar.commands import demo as module
from lightning_mvar.commands.demo import CONFIGS, ROOT, STAGES, demo
from lightning_mvar.io.configs import PACKAGED


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Calls of the stubs, each of which writes its stage's product; `fit` fails if a file `fail` exists."""
    monkeypatch.chdir(tmp_path)
    CONFIGS.mkdir(parents=True)
    for name in ("digits.yaml", "digits_tokenizer.yaml"):
        (CONFIGS / name).write_text("steps: 1")
    calls: list[list[str]] = []

    def run_stub(words: list[str]) -> int:
        calls.append(words)
        (stage,) = (stage for stage in STAGES if " ".join(words).startswith(stage.command))
        product = stage.output / stage.product
        product.parent.mkdir(parents=True, exist_ok=True)
        product.write_text("product")
        return 130 if words[0] == "fit" and Path("fail").exists() else 0

    monkeypatch.setattr(module, "run_and_wait", run_stub)
    monkeypatch.setattr(module, "write_metrics", lambda: None)
    return calls


def command_names(calls: list[list[str]]) -> list[str]:
    return [words[0] for words in calls]


ALL_COMMANDS = [
    "train-tokenizer",
    "tokenize",
    "tokenize",
    "fit",
    "export",
    "sample",
    "train-scorer",
    "sample",
    "evaluate",
]


def test_finished_stages_are_skipped(calls: list[list[str]]) -> None:
    demo()
    assert command_names(calls) == ALL_COMMANDS
    demo()
    assert command_names(calls) == ALL_COMMANDS


def test_without_configs_here_the_demo_uses_those_of_the_package(calls: list[list[str]]) -> None:
    shutil.rmtree("configs")
    demo()
    assert command_names(calls) == ALL_COMMANDS
    (fit,) = (stage for stage in STAGES if stage.name == "fit")
    assert (PACKAGED / "experiment/digits.yaml").read_text() in fit.identity


def test_all_stages_run_on_the_cpu() -> None:
    """`tokenize`, `sample` and `evaluate` would take a GPU of the machine by default."""
    for stage in STAGES:
        name, *options = stage.command.split()
        if "--config" in options:
            config = yaml.safe_load((Path(__file__).parents[2] / options[1]).read_text())
            assert config["trainer"]["accelerator"] == "cpu"
        elif name != "export":
            assert "--device cpu" in stage.command


def test_an_interrupted_stage_resumes_from_its_checkpoint(calls: list[list[str]]) -> None:
    Path("fail").touch()
    with pytest.raises(SystemExit) as stop:
        demo()
    assert stop.value.code == 130
    Path("fail").unlink()
    (ROOT / "mvar/step").touch()
    calls.clear()
    demo()
    assert command_names(calls) == ALL_COMMANDS[3:]
    assert calls[0][-1] == "--resume"
    assert (ROOT / "mvar/step").exists()


def test_an_edited_configuration_reruns_its_stage_and_all_later_stages(calls: list[list[str]]) -> None:
    demo()
    calls.clear()
    (CONFIGS / "digits.yaml").write_text("steps: 2")
    (ROOT / "mvar/step").touch()
    demo()
    assert command_names(calls) == ALL_COMMANDS[3:]
    assert not (ROOT / "mvar/step").exists()


def test_a_deleted_product_is_produced_again(calls: list[list[str]]) -> None:
    demo()
    calls.clear()
    (ROOT / "shards/val/manifest.json").unlink()
    demo()
    assert command_names(calls) == ALL_COMMANDS[2:]
