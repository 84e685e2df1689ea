"""Commands in processes of their own, and the server that starts them."""

import os
import signal
from multiprocessing import forkserver

from lightning_mvar.sweeps.processes import Surroundings, start


def test_a_signal_to_the_whole_group_ends_the_command_and_not_the_server() -> None:
    """Whose end would leave exit codes that nobody knows."""
    command = start(["bench", "memory"], Surroundings())
    server = forkserver._forkserver._forkserver_pid
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        os.kill(server, number)
    os.kill(command.pid, signal.SIGTERM)
    command.join()
    assert command.exitcode == -signal.SIGTERM
    again = start(["--version"], Surroundings())
    again.join()
    assert again.exitcode == 0
