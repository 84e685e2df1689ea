"""Ranks that never start."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
from processes import start

from lightning_mvar.cli.ranks import START_TIMEOUT


def end_before_rendezvous(rank: int, killed: int) -> None:
    os.environ[START_TIMEOUT] = "3"
    if rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("killed", "strategy"), [(1, "ddp"), (0, "ddp"), (1, "fsdp2")])
def test_a_rank_killed_before_the_process_group_exists_ends_the_other(
    plain_run_folder: Path, killed: int, strategy: str
) -> None:
    command = ["fit", "--config", "run.yaml", "--data.batch_size", "8", "--trainer.strategy", strategy]
    ranks = start(command, plain_run_folder, 2, prepare=partial(end_before_rendezvous, killed=killed))
    codes = ranks.wait(60)
    assert sorted(codes) == [-signal.SIGKILL, 1], ranks.printed()
    message = f"rank {1 - killed} ends: not all 2 ranks have started within 3 s ("
    assert message in ranks.printed()
    assert "see the messages of the others" in ranks.printed()
