"""Sweeps of the tiny run: finished, restarted, crashed, killed and interrupted."""

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
from lightning_mvar.checkpoints.training import newest_first, read_tensors
from lightning_mvar.cli import run
from lightning_mvar.io.locks import lock_folder
from lightning_mvar.sweeps.cells import Cell, attempts
from lightning_mvar.sweeps.results import read_results

SWEEP = """
prepare: [shards info shards]
fit: --config run.yaml --trainer.max_steps 18
evaluate: --reference images --extractor conftest.Pixels --per_class 3 --cache cache
axes: {mixer: [mvar.yaml, var.yaml]}
seeds: [0, 1]
"""
SEED_0 = SWEEP.replace("[0, 1]", "[0]")
CELLS = ["mvar-seed0", "mvar-seed1", "var-seed0", "var-seed1"]


def make_folder(folder: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """Makes a folder with a sweep.yaml of four cells and its inputs."""
    prepare_run(folder, tokenizer, tokenizer_folder, draws=False)
    (folder / "mvar.yaml").write_text("model: {network: {mixers: [scale_attention, mamba2]}}")
    (folder / "var.yaml").write_text("model: {network: {mixers: [block_causal_attention]}}")
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path, tokenizer, tokenizer_folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, tokenizer_folder: Path) -> Path:
    """Returns the output folder of the sweep after one uninterrupted run."""
    folder = make_folder(tmp_path_factory.mktemp("uninterrupted"), tokenizer, tokenizer_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["sweep", "sweep.yaml", "--out", "out", "--jobs", "2"]) == 0
    return folder / "out"


def exit_codes(out: Path) -> dict[str, list[int | None]]:
    """Returns the exit codes of all attempts at each cell."""
    return {path.name: [a.code for a in attempts(path)] for path in sorted((out / "cells").iterdir())}


def results(cell: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights = read_tensors(newest_first(cell / "checkpoints")[0], "")
    (scores,) = json.loads((cell / "scores.json").read_text())
    return weights, {name: score for name, score in scores.items() if name not in ("samples", "images_per_s")}


def assert_seed_0_equals(out: Path, expected: Path) -> None:
    for name in ("mvar-seed0", "var-seed0"):
        (weights, scores), (other_weights, other_scores) = (
            results(out / "cells" / name),
            results(expected / "cells" / name),
        )
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
        assert scores == other_scores


def test_every_cell_is_a_separate_run_with_scores(uninterrupted: Path) -> None:
    assert exit_codes(uninterrupted) == {name: [0] for name in CELLS}
    assert (uninterrupted / "sweep.yaml").read_text() == SWEEP
    outcomes = [results(uninterrupted / "cells" / name) for name in CELLS]
    assert len({scores["network"] for _, scores in outcomes}) == 4
    assert [any("mixers.1" in key for key in weights) for weights, _ in outcomes] == [True, True, False, False]
    for name, (_, scores) in zip(CELLS, outcomes, strict=True):
        assert (scores["seed"], scores["num_samples"]) == (int(name[-1]), 30)
        assert scores["frechet_distance"] > 0
        assert list((uninterrupted / "cells" / name).rglob("config.yaml"))


def test_the_commands_of_a_cell_give_the_same_results_by_hand(uninterrupted: Path, run_folder: Path) -> None:
    cell = Cell.read(uninterrupted / "cells/var-seed1")
    for command in cell.commands:
        assert run(command.split()) == 0
    weights, scores = results(run_folder / "out/cells/var-seed1")
    assert all(torch.equal(weights[key], value) for key, value in results(cell.folder)[0].items())
    assert scores == results(cell.folder)[1]


def test_a_restarted_sweep_skips_finished_cells(uninterrupted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in uninterrupted.rglob("attempts.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(uninterrupted.parent)
        assert run(["sweep", "sweep.yaml", "--out", "out"]) == 0
    assert "4 of 4 cells finished, 4 earlier" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in uninterrupted.rglob("attempts.jsonl")} == before


def test_another_seed_adds_cells_and_another_command_is_refused(
    uninterrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(uninterrupted.parent)
        Path("other.yaml").write_text(SWEEP.replace("18", "19"))
        assert run(["sweep", "other.yaml", "--out", "out"]) == 1
        assert "cell mvar-seed0 has been run before, and its commands have changed" in capfd.readouterr().err
        Path("fewer.yaml").write_text(SWEEP.replace("[mvar.yaml, var.yaml]", "[mvar.yaml]"))
        assert run(["sweep", "fewer.yaml", "--out", "out"]) == 1
        refused = "var-seed0 has axes {'mixer': 'var'} that fewer.yaml does not have: add them to the sweep file"
        assert refused in capfd.readouterr().err
        Path("seed.yaml").write_text(SWEEP.replace("[0, 1]", "[1, 2]"))
        for options in ([], ["--dry_run", "true"]):
            assert run(["sweep", "seed.yaml", "--out", "out", *options]) == 1
            assert "mvar-seed0 has seed 0, which seed.yaml does not have: add it to the" in capfd.readouterr().err
        assert (uninterrupted / "sweep.yaml").read_text() == SWEEP
        Path("more.yaml").write_text(SWEEP.replace("[0, 1]", "[0, 1, 2]"))
        assert run(["sweep", "more.yaml", "--out", "out", "--dry_run", "true"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("lightning-mvar fit --config run.yaml") == 6
    assert "--seed_everything 2 --trainer.default_root_dir out/cells/var-seed2 --resume" in printed
    assert not (uninterrupted / "cells/var-seed2").exists()


def test_a_crashing_cell_is_retried_once_and_reported_and_the_others_finish(
    run_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = SEED_0.replace("axes: {mixer: [mvar.yaml, var.yaml]}", "axes: {data: {good: '', bad: --data.train nowhere}}")
    Path("sweep.yaml").write_text(text.replace("evaluate", "# evaluate"))
    assert run(["sweep", "sweep.yaml", "--jobs", "2"]) == 1
    out = Path("outputs/sweep/sweep")
    assert exit_codes(out) == {"bad-seed0": [1, 1], "good-seed0": [0]}
    captured = capfd.readouterr()
    assert f"1 of 2 cells have not finished: bad-seed0 crashed, see {out}/cells/bad-seed0/log.txt" in captured.err
    assert "nowhere does not exist" in captured.out  # the status line of the cell
    assert "Traceback" not in captured.out + captured.err


def act_when(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        end = time.monotonic() + 300
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def has_checkpoint(cell: Path) -> bool:
    return any((cell / "checkpoints").glob("step=*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_running_cells_and_the_same_command_resumes(
    run_folder: Path, uninterrupted: Path, capfd: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    out = run_folder / "out"
    Path("sweep.yaml").write_text(SEED_0)
    sender = act_when(lambda: has_checkpoint(out / "cells/mvar-seed0"), lambda: os.kill(os.getpid(), number))
    assert run(["sweep", "sweep.yaml", "--out", "out"]) == code
    sender.join()
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"lightning-mvar: interrupted by {signal.Signals(number).name}; 0 of 2 cells finished")
    assert message.endswith("run the same command again to continue")
    (stopped,) = exit_codes(out)["mvar-seed0"]
    assert stopped in (143, -signal.SIGTERM)  # in training, or during start-up or shutdown
    assert exit_codes(out)["var-seed0"] == []
    if number == signal.SIGTERM:
        return
    assert run(["sweep", "sweep.yaml", "--out", "out"]) == 0
    assert exit_codes(out) == {"mvar-seed0": [stopped, 0], "var-seed0": [0]}
    assert "resuming from" in (out / "cells/mvar-seed0/log.txt").read_text()
    assert_seed_0_equals(out, uninterrupted)


def test_a_killed_sweep_resumes_to_the_same_results(run_folder: Path, uninterrupted: Path) -> None:
    """Running cells notice, save and end; cells that had not started run once."""
    out = run_folder / "out"
    Path("sweep.yaml").write_text(SEED_0)
    killed = start(["sweep", "sweep.yaml", "--out", "out"], run_folder)
    while not has_checkpoint(out / "cells/mvar-seed0"):
        assert killed.ranks[0].is_alive(), killed.printed()
        time.sleep(0.01)
    killed.send(signal.SIGKILL)
    before = exit_codes(out)
    assert before == {"mvar-seed0": [None], "var-seed0": []}
    assert run(["sweep", "sweep.yaml", "--out", "out"]) == 0
    assert exit_codes(out) == {"mvar-seed0": [None, 0], "var-seed0": [0]}
    assert "interrupted by SIGTERM after step" in (out / "cells/mvar-seed0/log.txt").read_text()
    assert_seed_0_equals(out, uninterrupted)


def test_a_folder_has_one_sweep_at_a_time(run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with lock_folder(run_folder / "out", "sweep"):
        assert run(["sweep", "sweep.yaml", "--out", "out"]) == 1
    assert "another sweep is running in out" in capfd.readouterr().err
    assert not (run_folder / "out/cells").exists()


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ("18", "18 --trainer.max_stps 3", [], "cell mvar-seed0: unrecognized arguments: --trainer.max_stps 3"),
        ("--per_class", "--per_klass", [], "cell mvar-seed0: unrecognized arguments: --per_klass 3"),
        ("mixer: [mvar.yaml, var.yaml]", "model.network.depth: [1, few]", [], "cell depthfew-seed0: "),
        ("shards info shards", "likelyhood --help", [], "`prepare` has 'likelyhood --help'"),
        ("seeds", "budget: {parameters: 1000, by: heads}\nseeds", [], "`budget` must be"),
        ("18", "18", ["--jobs", "0"], "--jobs must be at least 1"),
        ("18", "18", ["--ray.gpu", "1"], "--ray is for --launcher ray, not local"),
        ("18", "18", ["--launcher", "slurm"], "launcher"),
        ("18", "18", ["--launcher", "submitit", "--submitit.color", "red"], "--submitit: "),
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    run_folder: Path, capfd: pytest.CaptureFixture[str], before: str, after: str, options: list[str], message: str
) -> None:
    assert before in SWEEP
    Path("sweep.yaml").write_text(SWEEP.replace(before, after))
    assert run(["sweep", "sweep.yaml", "--out", "out", *options]) == 1
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (run_folder / "out/cells").exists()


RUN = """
prepare: ["fit --config run.yaml --trainer.max_steps 2 --seed_everything {seed} --trainer.default_root_dir base/{seed}"]
run: ["export --ckpt_path base/{seed}/checkpoints/last.ckpt --out {out}/network"]
evaluate: >-
  --ckpt_path {out}/network --guidance {guidance} --reference images --extractor conftest.Pixels --per_class 3
  --cache cache
axes: {guidance: [0.5]}
seeds: [4]
sampling_seeds: [5, 6]
"""


def test_a_cell_of_commands_is_evaluated_with_each_sampling_seed(
    run_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("run-sweep.yaml").write_text(RUN.replace('"export', '"exports'))
    assert run(["sweep", "run-sweep.yaml", "--out", "out"]) == 1
    assert "`run` has 'exports --ckpt_path" in capfd.readouterr().err
    Path("run-sweep.yaml").write_text(RUN)
    command = ["sweep", "run-sweep.yaml", "--out", "out"]
    assert run([*command, "--dry_run"]) == 0
    printed = capfd.readouterr().out
    assert "--seed_everything 4 --trainer.default_root_dir base/4\n" in printed.partition("guidance0.5-seed4:")[0]
    cell = Path("out/cells/guidance0.5-seed4")
    Path("cache").write_text("")  # a file where `evaluate` needs a folder
    assert run(command) == 1
    Path("cache").unlink()
    before = (cell / "network/config.json").stat().st_mtime_ns
    assert run(command) == 0
    assert (cell / "network/config.json").stat().st_mtime_ns == before
    assert [attempt.commands for attempt in attempts(cell)] == [1, 0, 3]
    (result,) = read_results("out").cells
    scores = {seed: json.loads((cell / f"scores-{seed}.json").read_text())[0] for seed in (5, 6)}
    assert {seed: draw["frechet_distance"] for seed, draw in result.draws.items()} == {
        seed: score["frechet_distance"] for seed, score in scores.items()
    }
    assert [(score["seed"], score["guidance"]) for score in scores.values()] == [(5, 0.5), (6, 0.5)]
    assert scores[5]["frechet_distance"] != scores[6]["frechet_distance"]


def test_a_budget_becomes_arguments_of_fit(run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = SWEEP.replace("seeds", "budget: {parameters: 1e6, by: width}\nseeds")
    Path("sweep.yaml").write_text(text)
    assert run(["sweep", "sweep.yaml", "--out", "out", "--dry_run", "true"]) == 0
    fit_args = [line.split() for line in capfd.readouterr().out.splitlines() if " fit " in line]
    widths = [int(args[args.index("--model.network.width") + 1]) for args in fit_args]
    assert widths[0] == widths[1] < widths[2] == widths[3]  # M-VAR has more parameters at the same width
