"""Time-outs of the process group after the start."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lightning_mvar.training.lightning_internals import setup_with_timeout


class OneRank:
    """Strategy of a single rank that creates its process group as Lightning's do."""

    def __init__(self, file: Path) -> None:
        self.file, self._timeout = file, timedelta(minutes=30)

    def setup_environment(self) -> None:
        dist.init_process_group("gloo", f"file://{self.file}", self._timeout, world_size=1, rank=0)
        self.timeout_at_start = _get_default_store().timeout

    def barrier(self, name: str) -> None:
        dist.barrier()


def test_the_time_out_of_the_start_ends_with_it(tmp_path: Path) -> None:
    strategy = OneRank(tmp_path / "store")
    try:
        setup_with_timeout(strategy, timedelta(seconds=3))
        assert strategy.timeout_at_start == timedelta(seconds=3)
        assert strategy._timeout == _get_default_store().timeout == timedelta(minutes=30)
    finally:
        dist.destroy_process_group()
