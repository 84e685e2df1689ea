"""A Slurm cluster of two nodes on this machine, for the time of a test module.

Needs root, Slurm's daemons and MUNGE (Debian: slurmctld, slurmd, slurm-client, munge).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import free_port

DAEMONS, CLIENTS = ("munged", "slurmctld", "slurmd"), ("sbatch", "srun", "scontrol", "scancel", "squeue")
PATH = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has the daemons
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2
PartitionName=test Nodes=node1,node2 Default=YES MaxTime=INFINITE
"""


def is_missing() -> bool:
    """Returns whether this machine cannot run the cluster."""
    return os.geteuid() != 0 or any(shutil.which(name, path=PATH) is None for name in (*DAEMONS, *CLIENTS))


def slurm(*command: str) -> str:
    """Runs a client of Slurm and returns its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.2)


@contextmanager
def running_cluster(folder: Path) -> Iterator[None]:
    """Starts the cluster, to which SLURM_CONF must point, and ends all its jobs and daemons on exit."""
    for name in ("state", "munge", "spool-node1", "spool-node2"):
        (folder / name).mkdir()
    ports = {name: free_port() for name in ("port", "port1", "port2")}
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=os.uname().nodename.split(".")[0], **ports))
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"key": key, "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
    options = [f"--{name}-file={folder / 'munge' / file}" for name, file in files.items() if name != "socket"]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *options],
        ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
        *(["slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf"] for node in ("node1", "node2")),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / "daemons.log").open("ab") as output:
                daemons.append(subprocess.Popen(command, stdout=output, stderr=output))
            if command[0] == "munged":
                wait_until((folder / "munge/socket").exists)
        wait_until(
            lambda: "node[1-2]" in subprocess.run(["sinfo", "-ht", "idle"], capture_output=True, text=True).stdout
        )
        yield
        slurm("scancel", "--user", "root")
        wait_until(lambda: not slurm("squeue", "-h"))
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
