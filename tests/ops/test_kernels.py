"""Detection of kernels on machines whose packages or compilers are broken."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from lightning_mvar.ops import kernels
from lightning_mvar.ops.kernels import KERNELS, Kernels, look_for_kernels


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    look_for_kernels.cache_clear()
    yield
    look_for_kernels.cache_clear()
    KERNELS.clear()


@pytest.mark.parametrize(
    "error",
    [ImportError("no module"), AttributeError("no symbol"), OSError("libcuda"), RuntimeError("no gcc\nlong log")],
)
def test_kernels_that_fail_are_reported_once_and_cost_no_others(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Kernels:
        raise error

    working = {"packed attention": len}
    sources = [("the scan", broken, "install gcc"), ("attention", lambda: working, "upgrade")]
    monkeypatch.setattr(kernels, "SOURCES", sources)
    look_for_kernels()
    look_for_kernels()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert warning == f"the scan: using PyTorch operations, which are slower ({reason}); to mend it, install gcc"
    assert working == KERNELS


def test_a_gpu_on_which_no_kernel_runs_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """This machine claims a GPU that it does not have, so the kernels that are run as probes fail."""
    look_for_kernels()
    assert KERNELS == {}
    for purpose in ("Mamba-2, QK-norm and AdaLN", "attention inside scales"):
        assert f"{purpose}: using PyTorch operations" in caplog.text


@pytest.mark.parametrize("capability", [(7, 5), (7, 0)])
def test_older_gpus_use_none(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    look_for_kernels()
    assert KERNELS == {}
