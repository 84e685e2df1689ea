"""Which commands run before the cells, and when again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.io.locks import FileLock
from lightning_mvar.sweeps import preparation
from lightning_mvar.sweeps.preparation import prepare
from lightning_mvar.sweeps.processes import Stop, Surroundings

LOCK = FileLock(-1)  # of the sweep, held by what runs
COMMANDS = (("train-tokenizer", "--config", "a.yaml"), ("tokenize", "--images", "my images"), ("tokenize", "--more"))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; one with a file of its first word's name ends with the code in it."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("steps: 1")
    made: list[list[str]] = []

    def pretend(stop: Stop, words: list[str], surroundings: Surroundings) -> int:
        assert surroundings.lock is LOCK
        made.append(words)
        return int(Path(words[0]).read_text()) if Path(words[0]).exists() else 0

    monkeypatch.setattr(preparation, "wait_unless", pretend)
    return made


def test_commands_run_once_in_order(calls: list[list[str]]) -> None:
    for _ in range(2):
        prepare(COMMANDS, Path("out"), Stop(), LOCK)
    assert calls == [list(words) for words in COMMANDS]


def test_a_failure_ends_it_and_the_next_start_goes_on_there(calls: list[list[str]]) -> None:
    for code, message in (
        ("1", r"`lightning-mvar tokenize --images 'my images'` failed with code 1"),
        ("143", "was interrupted"),
    ):
        Path("tokenize").write_text(code)
        with pytest.raises(InputError, match=message):
            prepare(COMMANDS, Path("out"), Stop(), LOCK)
    Path("tokenize").unlink()
    prepare(COMMANDS, Path("out"), Stop(), LOCK)
    assert [words[0] for words in calls] == ["train-tokenizer", *["tokenize"] * 4]


@pytest.mark.parametrize("change", ["words", "yaml"])
def test_what_changed_runs_again_with_all_that_follows(calls: list[list[str]], change: str) -> None:
    prepare(COMMANDS, Path("out"), Stop(), LOCK)
    calls.clear()
    changed = COMMANDS
    if change == "yaml":
        Path("a.yaml").write_text("steps: 2")
    else:
        changed = (COMMANDS[0], ("tokenize", "--images", "others"), COMMANDS[2])
    prepare(changed, Path("out"), Stop(), LOCK)
    assert calls == [list(words) for words in (changed if change == "yaml" else changed[1:])]
