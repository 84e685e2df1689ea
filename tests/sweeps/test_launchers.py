"""Launchers: all of them run the same cells to the same results."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prepare_run

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints.training import read_tensors
from lightning_mvar.errors import InputError
from lightning_mvar.sweeps import launchers
from lightning_mvar.sweeps.cells import Cell, attempts
from lightning_mvar.sweeps.launchers import CellJob, Launcher, local_launcher, ray_launcher, submitit_launcher
from lightning_mvar.sweeps.processes import Share, Stop

MAKE_LAUNCHER: dict[str, Callable[[Path], Launcher]] = {
    "submitit": lambda folder: submitit_launcher(2, folder / "submitit", {"cluster": "local", "timeout_min": 5}),
    "ray": lambda folder: ray_launcher(2, folder / "ray", {"cpu": 1}),
}


def make_cell(root: Path, options: str = "--seed_everything 3") -> Cell:
    """Makes a cell that trains the tiny network."""
    folder = root / "cells/trained"
    cell = Cell(folder, {}, 0, (f"fit --config run.yaml {options} --trainer.default_root_dir {folder} --resume",))
    cell.record()
    return cell


def weights(cell: Cell) -> dict[str, torch.Tensor]:
    return read_tensors((cell.folder / "checkpoints/last.ckpt").resolve(), "")


@pytest.mark.parametrize("name", MAKE_LAUNCHER)
def test_a_cell_ends_as_with_the_local_launcher(
    name: str, tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    prepare_run(tmp_path, tokenizer, tokenizer_folder, draws=False)
    expected, cell = make_cell(Path("local")), make_cell(Path(name))
    local_launcher(1)([expected.folder], Stop())
    MAKE_LAUNCHER[name](Path(name))([cell.folder], Stop())
    assert cell.state() == expected.state() == "finished"
    assert len(attempts(cell.folder)) == 1
    trained, reference = weights(cell), weights(expected)
    assert trained.keys() == reference.keys()
    assert max(float((value - reference[key]).abs().max()) for key, value in trained.items()) < 1e-6


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores what a job changes in its process."""
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_process")
def test_a_cell_that_crashes_in_a_job_is_recorded_once(plain_run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plain_run_folder)
    cell = make_cell(plain_run_folder, "--data.train nowhere")
    assert CellJob(cell.folder)() == 1
    assert cell.state() == "crashed"
    assert len(attempts(cell.folder)) == 1
    assert "nowhere does not exist" in cell.log.read_text()


def test_nothing_new_starts_after_a_stop(tmp_path: Path) -> None:
    cell = make_cell(tmp_path)
    local_launcher(2)([cell.folder], Stop(15))
    assert cell.state() == "waiting"


@pytest.mark.parametrize(
    ("jobs", "visible", "expected"),
    [
        (8, None, list("01234567")),
        (3, None, ["0,3,6", "1,4,7", "2,5"]),
        (10, None, [*"01234567", "0", "1"]),
        (2, "4, GPU-ab", ["4", "GPU-ab"]),  # as chosen by the user
        (1, None, [None]),
    ],
)
def test_jobs_on_this_machine_share_its_gpus(
    jobs: int, visible: str | None, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8 if visible is None else visible.count(",") + 1)
    assert launchers.split_machine(jobs) == [Share(jobs, gpus) for gpus in expected]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launchers.split_machine(jobs) == [Share(jobs)] * jobs


@pytest.mark.usefixtures("own_process")
def test_a_job_at_its_time_limit_saves_and_is_submitted_again(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acts as submitit does in the job's process before the time limit: calls `checkpoint`, then exits."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    prepare_run(tmp_path, tokenizer, tokenizer_folder, draws=False)
    cell = make_cell(tmp_path)
    job = CellJob(cell.folder)
    resubmitted: list[Any] = []

    def leave(number: int, frame: object) -> None:
        resubmitted.append(job.checkpoint())
        raise SystemExit(144)

    def warn_after_the_first_checkpoint() -> None:
        while not any((cell.folder / "checkpoints").glob("step=*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    signal.signal(signal.SIGUSR2, leave)
    threading.Thread(target=warn_after_the_first_checkpoint).start()
    with pytest.raises(SystemExit):
        job()
    assert cell.state() == "interrupted"
    (delayed,) = pickle.loads(pickle.dumps(resubmitted))
    assert delayed.result() == 0
    assert cell.state() == "finished"
    assert "resuming from" in cell.log.read_text()


def test_the_reason_of_a_failed_job_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    submitit = pytest.importorskip("submitit")

    def end_as_submitit_does_after_the_last_time_limit() -> None:
        from submitit.core.utils import UncompletedJobError

        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    executor = submitit.AutoExecutor(tmp_path, cluster="local")
    job = executor.submit(end_as_submitit_does_after_the_last_time_limit)
    launchers.report_failure(job)
    error = capfd.readouterr().err
    assert error == (
        f"job {job.job_id} failed: Job not requeued because: timed-out too many times; see {job.paths.stderr}\n"
    )


@pytest.mark.parametrize("name", ["submitit", "ray"])
def test_a_missing_package_is_named_with_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"needs {name}: pip install .*{name}"):
        MAKE_LAUNCHER[name](tmp_path)
