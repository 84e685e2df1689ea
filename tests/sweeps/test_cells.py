"""Attempts at a cell: their records, the state that follows from them, locks and signals."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from lightning_mvar.errors import InputError
from lightning_mvar.io.configs import PACKAGED
from lightning_mvar.io.locks import FileLock, is_locked
from lightning_mvar.sweeps.cells import Cell, append_attempt, attempts, last_line, progress, run_cell
from lightning_mvar.sweeps.processes import FORKSERVER, ProcessContext, Share, Stop, run_until_stopped

GOOD, BAD = "--version", "no-such-command"


def make_cell(folder: Path, *commands: str) -> Cell:
    cell = Cell(folder / "cells/mvar-seed3", {"mixer": "mvar"}, 3, commands)
    cell.record()
    return cell


def test_a_cell_runs_its_commands_until_one_fails_and_does_not_run_again_once_finished(tmp_path: Path) -> None:
    cell = make_cell(tmp_path, GOOD, BAD, "never")
    assert cell.state() == "waiting"
    assert run_cell(cell.folder, Stop()) == 1
    assert cell.state() == "crashed"
    log = cell.log.read_text()
    assert "[attempt 1] lightning-mvar --version\nlightning-mvar 0" in log
    assert "unknown command 'no-such-command'" in log
    assert "never" not in log
    cell = make_cell(tmp_path, GOOD, "--help")
    for _ in range(2):
        assert run_cell(cell.folder, Stop()) == 0
        assert cell.state() == "finished"
    first, second = attempts(cell.folder)
    assert (first.attempt, first.code, second.attempt, second.code) == (1, 1, 2, 0)
    assert first.seconds is not None
    lines = [json.loads(line) for line in (cell.folder / "attempts.jsonl").read_text().splitlines()]
    begin, end, success = {"attempt", "begin"}, {"attempt", "end", "seconds", "code"}, {"attempt", "commands"}
    assert [set(line) for line in lines] == [begin, success, end] * 2
    assert (first.commands, second.commands) == (1, 2)
    log = cell.log.read_text()  # the command that succeeded at first is not repeated
    assert "[attempt 2] lightning-mvar --help" in log
    assert "[attempt 2] lightning-mvar --version" not in log


def test_cell_json_holds_the_definition_of_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = make_cell(tmp_path, "fit --config a.yaml --config configs/mixer/var.yaml", GOOD)
    definition = json.loads((cell.folder / "cell.json").read_text())
    config = PACKAGED / "mixer/var.yaml"  # a.yaml does not exist
    hashes = {"configs/mixer/var.yaml": sha256(config.read_bytes()).hexdigest()}  # its folder differs among machines
    assert definition.pop("configs") == hashes
    commands = ["fit --config a.yaml --config configs/mixer/var.yaml", GOOD]
    assert definition == {"name": "mvar-seed3", "axes": {"mixer": "mvar"}, "seed": 3, "commands": commands}
    assert Cell.read(cell.folder) == cell


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (0, "finished"),
        (None, "interrupted"),
        (130, "interrupted"),
        (143, "interrupted"),
        (-signal.SIGKILL, "interrupted"),
        (1, "crashed"),
        (70, "crashed"),
        (-signal.SIGSEGV, "crashed"),
    ],
)
def test_the_state_is_that_of_the_last_attempt(tmp_path: Path, code: int | None, state: str) -> None:
    cell = make_cell(tmp_path, GOOD)
    for number, ended in ((1, 0 if code else 1), (2, code)):
        append_attempt(cell.folder, {"attempt": number, "begin": "2026-01-01T00:00:00+00:00", "commands": 1})
        if ended is not None:
            append_attempt(
                cell.folder, {"attempt": number, "end": "2026-01-01T00:00:01+00:00", "seconds": 1.0, "code": ended}
            )
    assert cell.state() == state


def test_an_attempt_replaces_a_half_written_line(tmp_path: Path) -> None:
    for number in (1, 2):
        append_attempt(tmp_path, {"attempt": number, "begin": "2026-01-01T00:00:00+00:00"})
        with (tmp_path / "attempts.jsonl").open("a") as file:
            file.write('{"attempt": 3, "beg')
    assert [attempt.attempt for attempt in attempts(tmp_path)] == [1, 2]


def test_a_started_cell_must_keep_its_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("steps: 1")
    cell = make_cell(tmp_path, "fit --config a.yaml")
    changed = Cell(cell.folder, cell.axes, cell.seed, ("fit --config a.yaml --more",))
    changed.check()  # not started yet
    append_attempt(cell.folder, {"attempt": 1, "begin": "2026-01-01T00:00:00+00:00"})
    cell.check()
    with pytest.raises(InputError, match=r"cell mvar-seed3 .*commands have changed.* another --out, or remove"):
        changed.check()
    Path("a.yaml").write_text("steps: 2")
    with pytest.raises(InputError, match=r"cell mvar-seed3 .*a YAML file that it names has changed"):
        cell.check()


def test_commands_may_follow_those_of_a_finished_cell(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("steps: 1")
    cell = make_cell(tmp_path, GOOD)
    assert run_cell(cell.folder, Stop()) == 0
    Cell(cell.folder, cell.axes, cell.seed, (GOOD, f"fit --config {config}")).check()
    longer = Cell(cell.folder, cell.axes, cell.seed, (GOOD, GOOD))
    longer.check()
    longer.record()
    assert longer.state() == "waiting"
    assert run_cell(cell.folder, Stop()) == 0
    assert longer.state() == "finished"
    assert longer.log.read_text().count(f"lightning-mvar {GOOD}") == 2
    with pytest.raises(InputError, match="commands have changed"):
        cell.check()


def test_a_cell_waits_for_the_process_that_still_runs_it(tmp_path: Path) -> None:
    cell = make_cell(tmp_path, GOOD)
    lock = FileLock.try_acquire(cell.lock)
    assert lock is not None
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run_cell(cell.folder, Stop())))
    thread.start()
    time.sleep(0.3)
    assert (cell.state(), attempts(cell.folder)) == ("running", [])
    lock.release()
    thread.join()
    assert codes == [0]
    assert not is_locked(cell.lock)


def test_waiting_for_a_cell_can_be_stopped(tmp_path: Path) -> None:
    cell, stop = make_cell(tmp_path, GOOD), Stop(signal.SIGTERM)
    assert run_cell(cell.folder, stop) == 143
    assert attempts(cell.folder) == []


def run_and_sleep(args: list[str], lock: FileLock, ready: str) -> None:
    """Starts a command that hangs, then sleeps until it is killed."""
    import lightning_mvar.sweeps.processes as module

    process = module.start(args, ProcessContext(lock=lock), die_with_parent=True)
    Path(ready).write_text(str(process.pid))
    time.sleep(60)


def test_an_orphan_holds_the_lock_and_ends_by_sigterm(tmp_path: Path) -> None:
    """The command outlasts the test: its file is a pipe without a writer."""
    os.mkfifo(tmp_path / "sweep.yaml")
    lock = FileLock.try_acquire(tmp_path / "lock")
    assert lock is not None
    ready = tmp_path / "ready"
    parent = FORKSERVER.Process(
        target=run_and_sleep, args=(["fit", "--config", str(tmp_path / "sweep.yaml")], lock, str(ready))
    )
    parent.start()
    lock.release()
    while not ready.exists() or not ready.read_text():
        time.sleep(0.02)
    assert is_locked(tmp_path / "lock")
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    end = time.monotonic() + 30
    while is_locked(tmp_path / "lock"):
        assert time.monotonic() < end, "the orphan still runs"
        time.sleep(0.02)


def test_stop_ends_a_running_command(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sweep.yaml")
    stop = Stop()
    timer = threading.Timer(1.0, lambda: setattr(stop, "signal", signal.SIGINT))
    timer.start()
    assert run_until_stopped(stop, ["fit", "--config", str(tmp_path / "sweep.yaml")]) == -signal.SIGTERM
    assert run_until_stopped(stop, [GOOD]) == 130


def print_share(context: ProcessContext) -> None:
    """Runs a command that prints what it has got of the machine."""
    import torch

    import lightning_mvar.sweeps.processes as module

    torch.set_num_threads(6)
    module.main = lambda: print("threads", torch.get_num_threads(), "GPUs", os.environ["CUDA_VISIBLE_DEVICES"])
    module.run_in_child([], context, die_with_parent=False)


def test_a_command_has_its_share_of_the_machine_and_its_own_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    process = FORKSERVER.Process(target=print_share, args=(ProcessContext(log, share=Share(2, "1,3")),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert log.read_text() == "before\nthreads 3 GPUs 1,3\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ""),
        ("a\nlast\n\n", "last"),
        ("bar 1%\rbar 50%\rbar 99%", "bar 99%"),
        ("text\n\x1b[32mgreen\x1b[0m\n\x1b[A\x1b[2K\r", "green"),
    ],
)
def test_the_last_line_of_a_log(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "log.txt").write_text(content)
    assert last_line(tmp_path / "log.txt") == expected
    assert last_line(tmp_path / "none.txt") == ""


def test_the_progress_of_a_cell_is_that_of_its_running_command(tmp_path: Path) -> None:
    cell = Cell(tmp_path, {}, 0, ("fit --config a.yaml", "evaluate --samples b.npz"))
    assert progress(cell) == "fit"
    log = "[attempt 1] lightning-mvar fit\nepoch 0:  45%|##  | 250/560 [00:12<00:15, 20.1step/s, loss=1]\r"
    cell.log.write_text(log + "Validation DataLoader 0:  50%|##  | 1/2 [00:00<00:00, 3.1it/s]\r")
    append_attempt(tmp_path, {"attempt": 1, "begin": "2026-01-01T00:00:00+00:00"})
    assert progress(cell) == "fit 250/560"
    append_attempt(tmp_path, {"attempt": 1, "commands": 1})
    cell.log.write_text(log + "\n[attempt 1] lightning-mvar evaluate\n")
    assert progress(cell) == "evaluate"
    append_attempt(tmp_path, {"attempt": 1, "commands": 2})
    assert progress(cell) == ""
