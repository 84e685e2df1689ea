"""Which stages of the demo run, and from what, with commands that only write down that they were called."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mvar.commands import demo as module
from lightning_mvar.commands.demo import CONFIGS, ROOT, STAGES, demo


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; each leaves its product, and fit is told to fail by a file `fail`."""
    monkeypatch.chdir(tmp_path)
    CONFIGS.mkdir(parents=True)
    for name in ("digits.yaml", "digits_tokenizer.yaml"):
        (CONFIGS / name).write_text("steps: 1")
    made: list[list[str]] = []

    def pretend(words: list[str]) -> int:
        made.append(words)
        (stage,) = (stage for stage in STAGES if " ".join(words).startswith(stage.command))
        product = stage.owns / stage.product
        product.parent.mkdir(parents=True, exist_ok=True)
        product.write_text("made")
        return 130 if words[0] == "fit" and Path("fail").exists() else 0

    monkeypatch.setattr(module, "run_command", pretend)
    monkeypatch.setattr(module, "write_metrics", lambda: None)
    return made


def names(calls: list[list[str]]) -> list[str]:
    return [words[0] for words in calls]


EVERYTHING = ["train-tokenizer", "tokenize", "tokenize", "fit", "export", "sample", "evaluate"]


def test_finished_stages_are_skipped(calls: list[list[str]]) -> None:
    demo()
    assert names(calls) == EVERYTHING
    demo()
    assert names(calls) == EVERYTHING


def test_an_interrupted_stage_goes_on_from_its_checkpoint(calls: list[list[str]]) -> None:
    Path("fail").touch()
    with pytest.raises(SystemExit) as stop:
        demo()
    assert stop.value.code == 130
    Path("fail").unlink()
    (ROOT / "mvar/step").touch()
    calls.clear()
    demo()
    assert names(calls) == EVERYTHING[3:]
    assert calls[0][-1] == "--resume"
    assert (ROOT / "mvar/step").exists()


def test_an_edited_configuration_starts_its_stage_anew_and_all_that_follow(calls: list[list[str]]) -> None:
    demo()
    calls.clear()
    (CONFIGS / "digits.yaml").write_text("steps: 2")
    (ROOT / "mvar/step").touch()
    demo()
    assert names(calls) == EVERYTHING[3:]
    assert not (ROOT / "mvar/step").exists()


def test_a_lost_product_is_made_again(calls: list[list[str]]) -> None:
    demo()
    calls.clear()
    (ROOT / "shards/val/manifest.json").unlink()
    demo()
    assert names(calls) == EVERYTHING[2:]
