"""Exceptions for mistakes that the user can fix, and for interruptions."""

from importlib.util import find_spec
from math import inf


class InputError(ValueError):
    """A user's mistake: a wrong path, value or file, or an incompatible combination.

    The message is one line that names the file or value and the remedy. The command line prints it without a
    traceback and exits with 1; any other exception is a bug in this package and keeps its traceback.
    """


def require_in(interval: str, prefix: str = "", hint: str = "", /, **values: float | None) -> None:
    """Raises InputError unless numbers lie in an interval, such as "[0, 1)"; None passes.

    Args:
        interval: integer bounds, with a bracket if they belong to it; "inf" for no upper bound.
        prefix: precedes the names in the message, such as "--".
        hint: follows the interval in the message, such as ", such as 0.95".
        values: numbers by name.
    """
    lower, upper = interval[1:-1].split(", ")
    low, high = int(lower), inf if upper == "inf" else int(upper)  # exact: seeds have more bits than a float
    allowed = f"in {interval}"
    if high == inf:
        allowed = "positive" if interval == "(0, inf)" else f"at least {low}"
    for name, value in values.items():
        if value is not None and not (
            (low <= value if interval[0] == "[" else low < value)
            and (value <= high if interval[-1] == "]" else value < high)
        ):
            finite = "finite and " if value == high == inf else ""
            raise InputError(f"{prefix}{name} must be {finite}{allowed}{hint}, got {value}")


def require_package(package: str, extra: str, purpose: str) -> None:
    """Raises InputError unless a package of an optional extra is installed; `purpose` says what needs it."""
    if find_spec(package) is None:
        raise InputError(f"{purpose} needs {package}: {install(extra)}")


def install(extra: str) -> str:
    """Returns the pip command that installs the packages of an optional extra, for a clone as for a wheel."""
    from importlib.metadata import PackageNotFoundError, requires  # importing it would double the time of `--version`

    try:
        requirements = [text.partition(";") for text in requires("lightning-mvar") or []]
    except PackageNotFoundError:  # a clone that is not installed
        requirements = []
    packages = [f"'{package.strip()}'" for package, _, marker in requirements if f'extra == "{extra}"' in marker]
    return " ".join(["pip install", *(packages or [f"-e '.[{extra}]'"])])


def one_line(error: BaseException) -> str:
    """Returns the message of an exception on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


# What a foreign module may raise if it is called with images but expects something else.
FOREIGN_MODULE_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


class DivergedError(InputError):
    """Training has diverged: its gradients are not finite, so the state of the run is not saved."""


RESUME_REMEDY = "--resume continues from the newest checkpoint"


class Interrupted(BaseException):
    """A signal ended the run, on all ranks at the same step. The command line exits with 128 + `signal`.

    Args:
        signal: number of the signal.
        message: what was interrupted, and where.
        remedy: how to continue.
    """

    def __init__(self, signal: int, message: str, remedy: str = RESUME_REMEDY) -> None:
        super().__init__(message)
        self.signal, self.remedy = signal, remedy
