"""Runs of `fit` in processes of their own, and acts in the middle of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import Run, start

from lightning_mvar.checkpoints.training import read_tensors

FIT = ["fit", "--config", "run.yaml", "--resume"]
TWO_RANKS = ["--data.batch_size", "8", "--trainer.strategy"]


def weights(root: Path) -> dict[str, torch.Tensor]:
    """Reads the network and its average from the newest checkpoint."""
    return read_tensors((root / "checkpoints/last.ckpt").resolve(), "")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def train(folder: Path, root: str, options: list[str], devices: int = 1, exit_code: int = 0) -> Run:
    """Runs to the end, which must come in time and with `exit_code` on all ranks."""
    started = start([*FIT, *options, "--trainer.default_root_dir", root], folder, devices, name=root)
    assert started.wait() == [exit_code] * devices, started.printed()
    return started


def act_in_step(rank: int, step: int | None, act: Callable[[Any, Any], None]) -> None:
    """Makes the last rank call `act(module, batch)` before each batch of an optimizer step; of all steps if None."""
    from lightning_mvar.training.mvar import LitMVAR

    training_step = LitMVAR.training_step

    def acting_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        if step in (None, self.global_step) and rank == self.trainer.world_size - 1:
            act(self, batch)
        return training_step(self, batch, batch_idx)

    LitMVAR.training_step = acting_step
