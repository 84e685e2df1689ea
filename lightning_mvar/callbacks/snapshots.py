"""Checkpoints of the weights and their averages at regular steps, for `merge --ema`."""

from __future__ import annotations

import lightning as L

from lightning_mvar.callbacks.checkpoint import AtomicCheckpoint
from lightning_mvar.errors import InputError, require_in
from lightning_mvar.training.mvar import LitMVAR


class SnapshotCheckpoint(AtomicCheckpoint):
    """Keeps the weights and their averages at regular steps, without the optimizer's state.

    Args:
        dirpath: folder of the snapshots; not the folder of another checkpoint callback.
        every_n_train_steps: steps between snapshots. 16 to 64 snapshots per run are enough; see docs/post_training.md.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int) -> None:
        require_in("[1, inf)", "SnapshotCheckpoint's ", every_n_train_steps=every_n_train_steps)
        super().__init__(dirpath, save_weights_only=True, every_n_train_steps=every_n_train_steps)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not (isinstance(pl_module, LitMVAR) and pl_module.power_ema):
            raise InputError("a SnapshotCheckpoint needs model.power_ema, such as [0.05, 0.10]")
        super().setup(trainer, pl_module, stage)
