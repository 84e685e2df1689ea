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
ARGS = (("train-tokenizer", "--config", "a.yaml"), ("tokenize", "--images", "my images"), ("tokenize", "--more"))
COMMANDS = [(None, args) for args in ARGS]


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
    assert calls == [list(args) for args in ARGS]


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
    changed = ARGS
    if change == "yaml":
        Path("a.yaml").write_text("steps: 2")
    else:
        changed = (ARGS[0], ("tokenize", "--images", "others"), ARGS[2])
    prepare([(None, args) for args in changed], Path("out"), Stop(), LOCK)
    assert calls == [list(args) for args in (changed if change == "yaml" else changed[1:])]


def per_seed(*seeds: int) -> list[tuple[int | None, tuple[str, ...]]]:
    """Returns a preparation of a shared command, two commands of each seed, and a shared one that reads all."""
    first: list[tuple[int | None, tuple[str, ...]]] = [(None, ("tokenize",))]
    each = [(seed, (name, str(seed))) for name in ("fit", "sample") for seed in seeds]
    return [*first, *each, (None, ("merge",))]


def run_again(calls: list[list[str]], commands: list[tuple[int | None, tuple[str, ...]]]) -> list[str]:
    """Returns the commands that the next start runs."""
    calls.clear()
    prepare(commands, Path("out"), Stop(), LOCK)
    return [" ".join(args) for args in calls]


def test_a_further_seed_runs_its_own_commands_and_shared_ones_that_follow(calls: list[list[str]]) -> None:
    assert len(run_again(calls, per_seed(0, 1))) == 6
    assert run_again(calls, per_seed(0, 1)) == []
    Path("sample").write_text("1")
    with pytest.raises(InputError, match="`lightning-mvar sample 2` failed"):
        prepare(per_seed(0, 1, 2), Path("out"), Stop(), LOCK)
    Path("sample").unlink()
    assert run_again(calls, per_seed(0, 1, 2)) == ["sample 2", "merge"]


def test_a_changed_command_of_a_seed_runs_later_ones_of_that_seed(calls: list[list[str]]) -> None:
    run_again(calls, per_seed(0, 1))
    changed = per_seed(0, 1)
    changed[1] = (0, ("fit", "0", "--more"))
    assert run_again(calls, changed) == ["fit 0 --more", "sample 0", "merge"]
