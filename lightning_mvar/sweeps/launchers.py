"""Where cells run: here, as jobs of submitit, or on a Ray cluster. All of them run `run_cell`.

A launcher tries each of the folders it is given once and comes back; how the tries ended is in the cells' records.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_mvar.errors import InputError
from lightning_mvar.sweeps.cells import run_cell
from lightning_mvar.sweeps.processes import Stop

Launcher = Callable[[list[Path], Stop], None]

POLL_JOBS_S = 1.0
A_DAY_MIN = 24 * 60


def require(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"--launcher {package} needs {package}: pip install 'lightning-mvar[{extra}]'")


def local_launcher(jobs: int) -> Launcher:
    """`jobs` cells at once on this machine, which share its threads."""

    def launch(folders: list[Path], stop: Stop) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda folder: run_cell(folder, stop, jobs), folders))

    return launch


class CellJob:
    """A cell as a job of submitit, which runs it again where it was cut short by a time limit or preemption."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stop, self.code = folder, Stop(), 0
        self.thread: threading.Thread | None = None

    def __call__(self) -> int:
        # Lightning would look for as many tasks of Slurm as there are devices; the job is one, and starts its ranks.
        os.environ["SLURM_JOB_NAME"] = "bash"
        for number in (signal.SIGINT, signal.SIGTERM):  # of a cancelled job; submitit would not hear the second
            signal.signal(number, self.receive)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        try:
            self.thread.join()
        except BaseException:  # what submitit leaves with after `checkpoint`
            self.end()
            raise
        return self.code

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.stop.signal = number

    def run(self) -> None:
        self.code = run_cell(self.folder, self.stop)

    def end(self) -> None:
        self.stop.signal = signal.SIGTERM
        if self.thread is not None:
            self.thread.join()

    def checkpoint(self) -> Any:
        """Called in this process some time before the limit: save, and say what to submit again."""
        from submitit.helpers import DelayedSubmission

        self.end()
        return DelayedSubmission(CellJob(self.folder))


def submitit_launcher(jobs: int, folder: Path, parameters: dict[str, Any]) -> Launcher:
    """`jobs` jobs at once.

    Args:
        jobs: that are submitted and have not ended.
        folder: for submitit's own files.
        parameters: of submitit's AutoExecutor: `cluster` (that of this machine where not given; `local` for none), and
            those of its update_parameters, such as timeout_min, gpus_per_node, slurm_partition.

    Raises:
        InputError: if submitit is not installed, does not know a parameter, or finds no cluster.
    """
    require("submitit", "sweep")
    from submitit import AutoExecutor

    rest = {"name": "sweep", "timeout_min": A_DAY_MIN} | parameters
    made: dict[str, Any] = {name: rest.pop(name) for name in ("cluster", "slurm_max_num_timeout") if name in rest}
    try:
        executor = AutoExecutor(folder, **made)
        executor.update_parameters(**rest)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"--submitit: {' '.join(str(error).split())}") from error

    def launch(folders: list[Path], stop: Stop) -> None:
        waiting, running, cancelled = list(folders), list[Any](), False
        while running or (waiting and not stop.signal):
            while waiting and len(running) < jobs and not stop.signal:
                running.append(submit(executor, waiting.pop(0)))
            time.sleep(POLL_JOBS_S)
            if stop.signal and not cancelled:
                cancelled = True
                for job in running:
                    job.cancel(check=False)
            for job in [job for job in running if job.done()]:
                running.remove(job)
                if not stop.signal:
                    report_failure(job)

    return launch


def report_failure(job: Any) -> None:
    """Say so if a job ended before it could run its cell, of which the cell's own log knows nothing."""
    error = job.exception()
    if error is not None:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"job {job.job_id} failed: {reason[-1]}; see {job.paths.stderr}", file=sys.stderr, flush=True)


def submit(executor: Any, folder: Path) -> Any:
    try:
        return executor.submit(CellJob(folder))
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        raise InputError(f"cannot submit {folder.name}: {' '.join(str(error).split())}") from error


def ray_launcher(jobs: int, folder: Path, resources: dict[str, float]) -> Launcher:
    """`jobs` trials of Ray Tune at once, on the cluster of RAY_ADDRESS or on this machine.

    Args:
        jobs: trials at once.
        folder: for Tune's own files, on a file system that all machines see.
        resources: of a trial, such as cpu and gpu.

    Raises:
        InputError: if Ray Tune is not installed.
    """
    require("ray", "ray")
    # Signals are ours to handle, and paths are relative to the folder that the sweep was started in.
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise InputError(f"--launcher ray ({error}): pip install 'lightning-mvar[ray]'") from error

    def launch(folders: list[Path], stop: Stop) -> None:
        class StopAll(tune.Stopper):
            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return bool(stop.signal)

        here, path = os.getcwd(), list(sys.path)

        def trial(config: dict[str, str]) -> None:
            os.chdir(here)
            sys.path[:] = path
            run_cell(Path(config["cell"]), Stop())

        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        try:
            tune.Tuner(
                tune.with_resources(trial, resources),
                param_space={"cell": tune.grid_search([str(folder) for folder in folders])},
                tune_config=tune.TuneConfig(max_concurrent_trials=jobs),
                run_config=tune.RunConfig(storage_path=str(folder.resolve()), verbose=0, stop=StopAll()),
            ).fit()
        finally:
            ray.shutdown()

    return launch
