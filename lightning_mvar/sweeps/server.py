"""What the server of `processes` imports first, and nothing else: it outlives signals to its whole group.

Those are for the commands, which save their state and end; the server is what knows their exit codes.
"""

import signal

from lightning_mvar.sweeps.processes import SERVER_OUTLIVES

# Held back, not ignored: what a command is sent before it lets them through again reaches it then.
signal.pthread_sigmask(signal.SIG_BLOCK, SERVER_OUTLIVES)
