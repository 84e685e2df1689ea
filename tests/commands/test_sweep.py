"""Sweeps of the tiny run: started, started again, crashed, killed and interrupted."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prepare_run
from processes import start

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints.training import by_time, read_tensors
from lightning_mvar.cli import run
from lightning_mvar.io.locks import FileLock
from lightning_mvar.sweeps.cells import Cell, attempts

SWEEP = """
prepare: [bench memory]
fit: --config run.yaml --trainer.max_steps 30
evaluate: --reference images --extractor conftest.Pixels --per_class 3 --cache cache
axes: {mixer: [mvar.yaml, var.yaml]}
seeds: [0, 1]
"""
HALF = SWEEP.replace("[0, 1]", "[0]")
CELLS = ["mvar-seed0", "mvar-seed1", "var-seed0", "var-seed1"]


def make_folder(folder: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """A folder with a sweep.yaml of four cells and all that it needs."""
    prepare_run(folder, tokenizer, tokenizer_folder, draws=False)
    (folder / "mvar.yaml").write_text("model: {network: {mixers: [scale_attention, mamba2]}}")
    (folder / "var.yaml").write_text("model: {network: {mixers: [block_causal_attention]}}")
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


@pytest.fixture
def here(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path, tokenizer, tokenizer_folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """The folder of the sweep after it has run once without a break."""
    folder = make_folder(tmp_path_factory.mktemp("whole"), tokenizer, tokenizer_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["sweep", "sweep.yaml", "--out", "out", "--jobs", "2"]) == 0
    return folder / "out"


def tries(out: Path) -> dict[str, list[int | None]]:
    """The codes of all attempts at each cell."""
    return {path.name: [a.code for a in attempts(path)] for path in sorted((out / "cells").iterdir())}


def results(cell: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights = read_tensors(by_time(cell / "checkpoints")[0], "")
    (scores,) = json.loads((cell / "scores.json").read_text())
    return weights, {name: score for name, score in scores.items() if name not in ("samples", "images_per_s")}


def assert_half_of(out: Path, expected: Path) -> None:
    for name in ("mvar-seed0", "var-seed0"):
        (weights, scores), (other_weights, other_scores) = (
            results(out / "cells" / name),
            results(expected / "cells" / name),
        )
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
        assert scores == other_scores


def test_every_cell_is_a_run_of_its_own_with_its_scores(whole: Path) -> None:
    assert tries(whole) == {name: [0] for name in CELLS}
    assert (whole / "sweep.yaml").read_text() == SWEEP
    found = [results(whole / "cells" / name) for name in CELLS]
    assert len({scores["network"] for _, scores in found}) == 4
    assert [any("mixers.1" in key for key in weights) for weights, _ in found] == [True, True, False, False]
    for name, (_, scores) in zip(CELLS, found, strict=True):
        assert (scores["seed"], scores["num_samples"]) == (int(name[-1]), 30)
        assert scores["frechet_distance"] > 0
        assert list((whole / "cells" / name).rglob("config.yaml"))


def test_a_cell_is_the_same_when_its_commands_are_run_by_hand(whole: Path, here: Path) -> None:
    cell = Cell.read(whole / "cells/var-seed1")
    for command in cell.commands:
        assert run(command.split()) == 0
    weights, scores = results(here / "out/cells/var-seed1")
    assert all(torch.equal(weights[key], value) for key, value in results(cell.folder)[0].items())
    assert scores == results(cell.folder)[1]


def test_started_again_it_skips_what_has_finished(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("attempts.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(whole.parent)
        assert run(["sweep", "sweep.yaml", "--out", "out"]) == 0
    assert "4 of 4 cells finished, 4 of them before" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in whole.rglob("attempts.jsonl")} == before


def test_another_seed_is_one_more_cell_and_another_command_is_refused(
    whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(whole.parent)
        Path("other.yaml").write_text(SWEEP.replace("30", "31"))
        assert run(["sweep", "other.yaml", "--out", "out"]) == 1
        assert "cell mvar-seed0 has been run before, and its commands have changed" in capfd.readouterr().err
        assert (whole / "sweep.yaml").read_text() == SWEEP
        Path("more.yaml").write_text(SWEEP.replace("[0, 1]", "[0, 1, 2]"))
        assert run(["sweep", "more.yaml", "--out", "out", "--dry_run", "true"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("lightning-mvar fit --config run.yaml") == 6
    assert "--seed_everything 2 --trainer.default_root_dir out/cells/var-seed2 --resume" in printed
    assert not (whole / "cells/var-seed2").exists()


def test_a_crashing_cell_is_tried_twice_and_named_and_the_others_finish(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = HALF.replace("axes: {mixer: [mvar.yaml, var.yaml]}", "axes: {data: {good: '', bad: --data.train nowhere}}")
    Path("sweep.yaml").write_text(text.replace("evaluate", "# evaluate"))
    assert run(["sweep", "sweep.yaml", "--jobs", "2"]) == 1
    out = Path("outputs/sweep/sweep")
    assert tries(out) == {"bad-seed0": [1, 1], "good-seed0": [0]}
    captured = capfd.readouterr()
    assert f"1 of 2 cells have not finished: bad-seed0 crashed, see {out}/cells/bad-seed0/log.txt" in captured.err
    assert "no token shards in nowhere" in captured.out  # the line of the cell
    assert "Traceback" not in captured.out + captured.err


def when(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        end = time.monotonic() + 300
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def saved(cell: Path) -> bool:
    return any((cell / "checkpoints").glob("step=*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_what_runs_and_the_same_command_goes_on(
    here: Path, whole: Path, capfd: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    out = here / "out"
    Path("sweep.yaml").write_text(HALF)
    sender = when(lambda: saved(out / "cells/mvar-seed0"), lambda: os.kill(os.getpid(), number))
    assert run(["sweep", "sweep.yaml", "--out", "out"]) == code
    sender.join()
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"lightning-mvar: interrupted by {signal.Signals(number).name}; 0 of 2 cells finished")
    assert said.endswith("the same command goes on with what is missing")
    (stopped,) = tries(out)["mvar-seed0"]
    assert stopped in (143, -signal.SIGTERM)  # while training, or on its way to or from it
    assert tries(out)["var-seed0"] == []
    if number == signal.SIGTERM:
        return
    assert run(["sweep", "sweep.yaml", "--out", "out"]) == 0
    assert tries(out) == {"mvar-seed0": [stopped, 0], "var-seed0": [0]}
    assert "resuming from" in (out / "cells/mvar-seed0/log.txt").read_text()
    assert_half_of(out, whole)


def test_a_sweep_that_is_killed_goes_on_to_the_same_results(here: Path, whole: Path) -> None:
    """The cells that were running notice, save and end; those that had not begun run once."""
    out = here / "out"
    Path("sweep.yaml").write_text(HALF)
    killed = start(["sweep", "sweep.yaml", "--out", "out"], here)
    while not saved(out / "cells/mvar-seed0"):
        assert killed.ranks[0].is_alive(), killed.printed()
        time.sleep(0.01)
    killed.send(signal.SIGKILL)
    before = tries(out)
    assert before == {"mvar-seed0": [None], "var-seed0": []}
    assert run(["sweep", "sweep.yaml", "--out", "out"]) == 0
    assert tries(out) == {"mvar-seed0": [None, 0], "var-seed0": [0]}
    assert "interrupted by SIGTERM after step" in (out / "cells/mvar-seed0/log.txt").read_text()
    assert_half_of(out, whole)


def test_one_sweep_at_a_time_works_in_a_folder(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    lock = FileLock.take(here / "out/.sweep.lock")
    assert lock is not None
    assert run(["sweep", "sweep.yaml", "--out", "out"]) == 1
    assert "another sweep is at work in out" in capfd.readouterr().err
    lock.release()
    assert not (here / "out/cells").exists()


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ("30", "30 --trainer.max_stps 3", [], "cell mvar-seed0: unrecognized arguments: --trainer.max_stps 3"),
        ("--per_class", "--per_klass", [], "cell mvar-seed0: unrecognized arguments: --per_klass 3"),
        ("mixer: [mvar.yaml, var.yaml]", "model.network.depth: [1, few]", [], "cell depthfew-seed0: "),
        ("bench memory", "likelyhood --help", [], "`prepare` has 'likelyhood --help'"),
        ("seeds", "budget: {parameters: 1000, by: heads}\nseeds", [], "`budget` must be"),
        ("30", "30", ["--jobs", "0"], "--jobs must be at least 1"),
        ("30", "30", ["--ray.gpu", "1"], "--ray is for --launcher ray, not local"),
        ("30", "30", ["--launcher", "slurm"], "launcher"),
        ("30", "30", ["--launcher", "submitit", "--submitit.colour", "red"], "--submitit: "),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    here: Path, capfd: pytest.CaptureFixture[str], before: str, after: str, options: list[str], message: str
) -> None:
    assert before in SWEEP
    Path("sweep.yaml").write_text(SWEEP.replace(before, after))
    assert run(["sweep", "sweep.yaml", "--out", "out", *options]) == 1
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (here / "out/cells").exists()


def test_a_budget_becomes_words_of_fit(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = SWEEP.replace("seeds", "budget: {parameters: 1e6, by: width}\nseeds")
    Path("sweep.yaml").write_text(text)
    assert run(["sweep", "sweep.yaml", "--out", "out", "--dry_run", "true"]) == 0
    fits = [line.split() for line in capfd.readouterr().out.splitlines() if " fit " in line]
    widths = [int(words[words.index("--model.network.width") + 1]) for words in fits]
    assert widths[0] == widths[1] < widths[2] == widths[3]  # M-VAR has more parameters at the same width
