"""Preparation of a sweep: commands run once, and again after a change or a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.io.locks import FileLock
from lightning_mvar.sweeps import preparation
from lightning_mvar.sweeps.preparation import prepare
from lightning_mvar.sweeps.processes import ProcessContext, Stop

LOCK = FileLock(-1)  # the sweep's lock, held by the running command
COMMANDS = (("train-tokenizer", "--config", "a.yaml"), ("tokenize", "--images", "my images"), ("tokenize", "--more"))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Returns the commands that were run; a file named like a command's first argument holds its exit code."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("steps: 1")
    recorded: list[list[str]] = []

    def fake_run(stop: Stop, args: list[str], context: ProcessContext) -> int:
        assert context.lock is LOCK
        recorded.append(args)
        return int(Path(args[0]).read_text()) if Path(args[0]).exists() else 0

    monkeypatch.setattr(preparation, "run_until_stopped", fake_run)
    return recorded


def test_commands_run_once_in_order(calls: list[list[str]]) -> None:
    for _ in range(2):
        prepare(COMMANDS, Path("out"), Stop(), LOCK)
    assert calls == [list(args) for args in COMMANDS]


def test_a_failure_ends_the_preparation_and_the_next_start_resumes_there(calls: list[list[str]]) -> None:
    for code, message in (
        ("1", r"`lightning-mvar tokenize --images 'my images'` failed with exit code 1"),
        ("143", "was interrupted"),
    ):
        Path("tokenize").write_text(code)
        with pytest.raises(InputError, match=message):
            prepare(COMMANDS, Path("out"), Stop(), LOCK)
    Path("tokenize").unlink()
    prepare(COMMANDS, Path("out"), Stop(), LOCK)
    assert [args[0] for args in calls] == ["train-tokenizer", *["tokenize"] * 4]


@pytest.mark.parametrize("change", ["args", "yaml"])
def test_a_changed_command_runs_again_with_all_later_ones(calls: list[list[str]], change: str) -> None:
    prepare(COMMANDS, Path("out"), Stop(), LOCK)
    calls.clear()
    changed = COMMANDS
    if change == "yaml":
        Path("a.yaml").write_text("steps: 2")
    else:
        changed = (COMMANDS[0], ("tokenize", "--images", "others"), COMMANDS[2])
    prepare(changed, Path("out"), Stop(), LOCK)
    assert calls == [list(args) for args in (changed if change == "yaml" else changed[1:])]
