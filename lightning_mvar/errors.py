"""The one exception that means: the user can repair this."""


class InputError(ValueError):
    """A mistake in what the user handed in: a path, a value, a file or a combination of them.

    The message is one line that names the file or value and the remedy. The command line prints it without a
    traceback and exits with 1; every other exception is a bug of ours and keeps its traceback.
    """


class DivergedError(InputError):
    """Training ends because its gradients are no numbers: the state of the run is not worth saving."""


class Interrupted(BaseException):
    """A signal asked the run to end, on all ranks at the same step. The command line exits with 128 + `signal`.

    Args:
        signal: its number.
        message: what was interrupted, and where.
        remedy: how to go on.
    """

    def __init__(self, signal: int, message: str, remedy: str = "--resume goes on from the newest checkpoint") -> None:
        super().__init__(message)
        self.signal, self.remedy = signal, remedy
