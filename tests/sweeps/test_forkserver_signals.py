"""The fork server that starts a process for each command."""

import os
import signal
from multiprocessing import forkserver

from lightning_mvar.sweeps.processes import ProcessContext, start


def test_a_signal_to_the_whole_group_ends_the_command_and_not_the_server() -> None:
    """If the server ended, the exit codes of running commands would be lost."""
    command = start(["bench", "memory"], ProcessContext())
    server = forkserver._forkserver._forkserver_pid
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        os.kill(server, number)
    os.kill(command.pid, signal.SIGTERM)
    command.join()
    assert command.exitcode == -signal.SIGTERM
    again = start(["--version"], ProcessContext())
    again.join()
    assert again.exitcode == 0
