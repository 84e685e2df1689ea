"""Tests of the installed package with every supported Python and torch: `nox`, or `nox --list` to choose.

Interpreters that this machine lacks are skipped. `nox -s "tests-3.12(torch='2.9.1')" -- tests/models` runs some tests.
Each session installs torch: with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu without gigabytes of CUDA.
"""

import shutil

import nox

nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("torch", ["2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0"])
def tests(session: nox.Session, torch: str) -> None:
    """Runs pytest on the newest versions of all packages but torch."""
    session.install(f"torch=={torch}")  # first: a range would fetch the newest
    shutil.rmtree("build", ignore_errors=True)  # setuptools would install removed files that are still there
    session.install(".[dev]")
    session.run("pytest", "--numprocesses=auto", "--dist=loadfile", *session.posargs, env={"OMP_NUM_THREADS": "1"})
