"""Errors of lost ranks, and collectives that wait for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from processes import free_port

from lightning_mvar.devices import in_process_group
from lightning_mvar.training.lost_ranks import abort_collectives, is_loss_of_rank


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 0."), True),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:77, remote process exited"), True),
        (dist.DistStoreError("wait timeout after 3000ms"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!"), False),
    ],
)
def test_errors_that_name_another_rank(error: Exception, lost: bool) -> None:
    assert is_loss_of_rank(error) == lost


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "kept"), [("gloo", True), ("nccl", False)])
def test_only_collectives_of_nccl_are_aborted(
    backend: str, kept: bool, process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    abort_collectives()
    assert in_process_group() == kept
    abort_collectives()  # a second error on the way out
