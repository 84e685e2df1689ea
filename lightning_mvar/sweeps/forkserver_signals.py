"""Signal mask of the fork server of `processes`, which imports this first: it outlives signals to its process group.

Such signals are for the commands, which save their state and end; the server must live on to report their exit codes.
"""

import signal

from lightning_mvar.sweeps.processes import SERVER_BLOCKED_SIGNALS

# Blocked, not ignored: a signal sent to a command before it unblocks them is delivered then.
signal.pthread_sigmask(signal.SIG_BLOCK, SERVER_BLOCKED_SIGNALS)
