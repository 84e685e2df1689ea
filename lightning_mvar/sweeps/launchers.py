"""Launchers that run cells on this machine, as submitit jobs or on a Ray cluster. All of them call `run_cell`.

A launcher makes one attempt at each folder it is given, then returns; the cells' records say how the attempts ended.
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
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import torch

from lightning_mvar.errors import InputError, install, require_package
from lightning_mvar.sweeps.cells import run_cell
from lightning_mvar.sweeps.processes import Share, Stop

Launcher = Callable[[list[Path], Stop], None]

POLL_JOBS_S = 1.0
DEFAULT_TIMEOUT_MIN = 24 * 60


def local_launcher(jobs: int) -> Launcher:
    """Returns a launcher that runs `jobs` cells at once on this machine; they share its threads and GPUs."""
    shares = SimpleQueue[Share]()
    for share in split_machine(jobs):
        shares.put(share)

    def run(folder: Path, stop: Stop) -> None:
        share = shares.get()
        try:
            run_cell(folder, stop, share)
        finally:
            shares.put(share)

    def launch(folders: list[Path], stop: Stop) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda folder: run(folder, stop), folders))

    return launch


def split_machine(jobs: int) -> list[Share]:
    """Returns equal shares of this machine: GPUs of its own for each job, or one that it shares if there are too few.

    Without GPUs, or for a single job, nothing is hidden from a job.
    """
    gpus = visible_gpus() if jobs > 1 else []
    if not gpus:
        return [Share(jobs)] * jobs
    return [Share(jobs, ",".join(gpus[job::jobs] or [gpus[job % len(gpus)]])) for job in range(jobs)]


def visible_gpus() -> list[str]:
    """Returns the names of this process's GPUs, as in CUDA_VISIBLE_DEVICES, without using any of them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return list(map(str, range(count))) if names is None else [name.strip() for name in names.split(",")][:count]


class CellJob:
    """A cell as a submitit job, which is submitted again after preemption or a time limit."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stop, self.code = folder, Stop(), 0
        self.thread: threading.Thread | None = None

    def __call__(self) -> int:
        # Lightning expects one Slurm task per device unless the job is interactive: this job is one task for all ranks.
        os.environ["SLURM_JOB_NAME"] = "bash"
        for number in (signal.SIGINT, signal.SIGTERM):  # sent to a cancelled job; submitit ignores SIGTERM
            signal.signal(number, self.receive)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        try:
            self.thread.join()
        except BaseException:  # how submitit ends the job after `checkpoint`
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
        """Saves and returns the job to submit again; submitit calls this shortly before the time limit."""
        from submitit.helpers import DelayedSubmission

        self.end()
        return DelayedSubmission(CellJob(self.folder))


def submitit_launcher(jobs: int, folder: Path, parameters: dict[str, Any]) -> Launcher:
    """Returns a launcher that keeps up to `jobs` submitit jobs in the queue.

    Args:
        jobs: maximum number of jobs that are submitted and have not ended.
        folder: folder for submitit's own files.
        parameters: parameters of submitit's AutoExecutor: `cluster` (default: detected; `local` for none), and
            those of its update_parameters, such as timeout_min, gpus_per_node, slurm_partition.

    Raises:
        InputError: if submitit is not installed, rejects a parameter, or finds no cluster.
    """
    require_package("submitit", "sweep", "--launcher submitit")
    from submitit import AutoExecutor

    options = {"name": "sweep", "timeout_min": DEFAULT_TIMEOUT_MIN} | parameters
    constructor_names = [name for name in ("cluster", "slurm_max_num_timeout") if name in options]
    constructor_options: dict[str, Any] = {name: options.pop(name) for name in constructor_names}
    try:
        executor = AutoExecutor(folder, **constructor_options)
        executor.update_parameters(**options)
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
    """Prints the error of a job that failed before it could run its cell and so is missing from the cell's log."""
    error = job.exception()
    if error is not None:
        print(f"job {job.job_id} failed: {failure_reason(error)}; see {job.paths.stderr}", file=sys.stderr, flush=True)


def failure_reason(error: BaseException) -> str:
    """Returns the last line of the traceback that a message of submitit quotes, or else of the message itself."""
    message = str(error)
    parts = message.split(f"\n{'-' * 22}\n")  # a sentence, the traceback, where the logs are
    lines = (parts[1] if len(parts) == 3 else message).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix("submitit.core.utils.UncompletedJobError: ").rstrip(".")


def submit(executor: Any, folder: Path) -> Any:
    try:
        return executor.submit(CellJob(folder))
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        raise InputError(f"cannot submit {folder.name}: {' '.join(str(error).split())}") from error


def ray_launcher(jobs: int, folder: Path, resources: dict[str, float]) -> Launcher:
    """Returns a launcher that runs `jobs` Ray Tune trials at once, on the cluster of RAY_ADDRESS or this machine.

    Args:
        jobs: number of trials at once.
        folder: folder for Tune's own files, on a file system that all machines share.
        resources: resources per trial, such as cpu and gpu.

    Raises:
        InputError: if Ray Tune is not installed.
    """
    require_package("ray", "ray", "--launcher ray")
    # The sweep handles signals itself, and paths are relative to the folder that it was started in.
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise InputError(f"--launcher ray ({error}): {install('ray')}") from error

    def launch(folders: list[Path], stop: Stop) -> None:
        class StopAll(tune.Stopper):
            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return bool(stop.signal)

        working_directory, import_path = os.getcwd(), list(sys.path)

        def trial(config: dict[str, str]) -> None:
            os.chdir(working_directory)
            sys.path[:] = import_path
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
