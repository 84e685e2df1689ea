"""The batch script of docs/devices.md, `sample` and sweeps on a real Slurm of two nodes, if one is installed here."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import slurm_cluster
import torch
from conftest import prepare_run
from processes import start
from slurm_cluster import running_cluster, slurm, wait_until
from training_runs import FIT, weights

from lightning_mvar import Tokenizer
from lightning_mvar.cli import run
from lightning_mvar.sweeps.cells import attempts

pytestmark = pytest.mark.skipif(slurm_cluster.is_missing(), reason="needs root, Slurm's daemons and MUNGE")

REPOSITORY = Path(__file__).parents[2]
ONE_RANK_PER_NODE = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none", "--output=job.txt"]
TWO_NODES = ["--data.batch_size", "8", "--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy"]


class PauseAtStepFive(L.Callback):
    """Makes the first attempt of a job wait at step 5, until the test has sent its signal."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == 5 and "SLURM_RESTART_COUNT" not in os.environ:
            Path(f"ready{trainer.global_rank}").touch()
            wait_until(Path("go").exists)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", slurm_cluster.PATH)
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # the names of the nodes are not in the DNS
        patch.setenv("PYTHONPATH", ":".join(map(str, (REPOSITORY, REPOSITORY / "tests", Path(__file__).parent))))
        with running_cluster(folder):
            yield


@pytest.fixture
def run_folder(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    prepare_run(tmp_path, tokenizer, tokenizer_folder, draws=False)
    return tmp_path


def documented_script(options: list[str]) -> str:
    """Returns the batch script of docs/devices.md, with other options of `fit` and this interpreter."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (REPOSITORY / "docs/devices.md").read_text(), re.DOTALL)
    script, changed = re.subn(
        r"\.venv/bin/lightning-mvar fit --resume .*?\n(?=code=)", f"{mvar(*FIT, *options)}\n", script, flags=re.DOTALL
    )
    assert changed == 1
    return script


def mvar(*arguments: str) -> str:
    return " ".join([sys.executable, "-m lightning_mvar", *arguments])


def submit(script: str, *options: str) -> str:
    """Submits a batch script and returns the number of its job."""
    Path("job.sh").write_text(script)
    return slurm("sbatch", "--parsable", *ONE_RANK_PER_NODE, *options, "job.sh")


def state(job: str) -> str:
    return slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def finish(job: str) -> None:
    wait_until(lambda: state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
    assert state(job) == "COMPLETED", Path("job.txt").read_text()


def skip_delay(job: str) -> None:
    """Starts a job that was queued again after 3 s, not two minutes; at once, its credential would count as revoked."""
    wait_until(lambda: slurm("squeue", "-h", "-j", job, "-o", "%T %r") == "PENDING BeginTime")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def test_the_documented_script_queues_a_run_again_and_ends_with_the_weights_of_an_uninterrupted_one(
    run_folder: Path,
) -> None:
    pause = ["--trainer.callbacks+", "test_slurm.PauseAtStepFive"]
    job = submit(documented_script([*TWO_NODES, "ddp", *pause]), "--time=10")
    wait_until(lambda: all(Path(f"ready{rank}").exists() for rank in range(2)))
    slurm("scancel", "--signal=USR1", job)  # as five minutes before the time limit
    Path("go").touch()
    skip_delay(job)
    finish(job)
    output = Path("job.txt").read_text()
    assert "interrupted by SIGUSR1 after step 6" in output
    assert re.search(r"resuming from .*step=00000006.ckpt", output)
    plain = ["--data.batch_size", "8", "--trainer.strategy", "ddp", "--trainer.default_root_dir", "plain"]
    uninterrupted = start([*FIT, *plain], run_folder, 2)
    assert uninterrupted.wait() == [0, 0], uninterrupted.printed()
    resumed, expected = weights(Path("run")), weights(Path("plain"))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_two_nodes_train_with_fsdp2_and_sample(run_folder: Path) -> None:
    fit = mvar(*FIT, *TWO_NODES, "fsdp2", "--trainer.max_steps", "3")
    drawing = ["--ckpt_path", "run/checkpoints/last.ckpt", "--per_class", "1", "--batch_size", "5"]
    sample = mvar("sample", *drawing, "--num_nodes", "2", "--out", "two.npz")
    finish(submit(f"#!/bin/bash\nset -e\nsrun {fit}\nsrun {sample}\n"))
    assert run(["sample", *drawing, "--out", "one.npz"]) == 0
    assert np.array_equal(np.load("two.npz")["arr_0"], np.load("one.npz")["arr_0"])
    plain = ["--data.batch_size", "8", "--trainer.strategy", "fsdp2", "--trainer.max_steps", "3"]
    expected = start([*FIT, *plain, "--trainer.default_root_dir", "plain"], run_folder, 2)
    assert expected.wait() == [0, 0], expected.printed()
    for root in ("run", "plain"):
        assert run(["export", "--ckpt_path", f"{root}/checkpoints/last.ckpt", "--out", f"{root}/export"]) == 0
    files = [Path(root, "export/network.safetensors") for root in ("run", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_preempted_cell_of_a_sweep_is_queued_again(run_folder: Path) -> None:
    pytest.importorskip("submitit")
    options = "--trainer.callbacks+ test_slurm.PauseAtStepFive"
    Path("sweep.yaml").write_text(f"fit: --config run.yaml {options}\naxes: {{model.ema_decay: [0.5]}}\n")
    command = ["sweep", "sweep.yaml", "--out", "out", "--launcher", "submitit", "--submitit.cluster", "slurm"]
    sweep = start([*command, "--submitit.timeout_min", "10"], run_folder)
    wait_until(lambda: Path("ready0").exists() or not sweep.ranks[0].is_alive())
    assert sweep.ranks[0].is_alive(), sweep.printed()
    job = slurm("squeue", "-h", "-o", "%i")
    slurm("scancel", "--signal=USR2", job)  # submitit's signal
    Path("go").touch()
    skip_delay(job)
    assert sweep.wait() == [0], sweep.printed()
    (cell,) = Path("out/cells").iterdir()
    assert [attempt.code for attempt in attempts(cell)] == [143, 0]
    assert "resuming from" in (cell / "log.txt").read_text()
