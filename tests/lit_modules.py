"""A tiny LitMVAR, a quiet trainer, and a callback that records losses."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from conftest import SCHEDULE
from lightning.pytorch.callbacks import Callback

from lightning_mvar import MVARConfig
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.optim import OptimizerConfig

NETWORK = {"depth": 2, "width": 32, "heads": 2, "vocab_size": 48, "code_dim": 8, "num_classes": 10}


class Losses(Callback):
    """Records the loss of each step and the metrics of each validation."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.train.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module) -> None:
        self.val.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


def make_module(tokenizer_folder: Path, model: dict[str, object] | None = None, **overrides: object) -> LitMVAR:
    """Builds the module; `model` holds its options, `overrides` those of the network."""
    torch.manual_seed(0)
    network = MVARConfig(SCHEDULE, **(NETWORK | {"head_dim": 16} | overrides))
    return LitMVAR(network, str(tokenizer_folder), OptimizerConfig(base_lr=0.05), **(model or {}))


def make_trainer(root: Path, max_steps: int, **options: object) -> L.Trainer:
    settings = {
        "accelerator": "cpu",
        "max_steps": max_steps,
        "log_every_n_steps": 1,
        "gradient_clip_val": 2.0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(root),
    }
    return L.Trainer(**(settings | options))
