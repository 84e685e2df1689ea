"""What TensorBoard shows of a run as a whole: configuration, hyperparameters, and which curves share a chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from torch.utils.tensorboard.summary import custom_scalars, text

from lightning_mvar.callbacks.tensorboard import BEFORE_TRAINING, writers
from lightning_mvar.io.files import atomic_path
from lightning_mvar.io.hparams import columns, row
from lightning_mvar.models.costs import costs_of
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.tokenizer import LitTokenizer

# What runs are compared by, the last value of each.
METRICS: dict[type, list[str]] = {
    LitMVAR: ["val/loss", "val/fid", "val/is", "val/precision", "val/recall", "train/loss"],
    LitTokenizer: ["val/loss", "val/l2", "val/l1", "val/codebook_usage", "train/loss"],
}

# Of each kind of run {category: {chart: regular expressions, which tags match from their beginning}}.
CHARTS: dict[type, dict[str, dict[str, list[str]]]] = {
    LitMVAR: {
        "loss": {
            "loss": ["train/loss$", "val/loss$"],
            "loss of the last scale": ["train/loss_last_scale$", "val/loss_last_scale$"],
            "training loss of each scale": ["scale_loss/"],
            "validation loss of each scale": ["val_scale_loss/"],
        },
        "accuracy": {
            "accuracy": ["train/acc$", "val/acc$"],
            "accuracy of the last scale": ["train/acc_last_scale$", "val/acc_last_scale$"],
        },
        "samples": {
            "Frechet distance": ["val/fid$"],
            "inception score": ["val/is$"],
            "precision and recall": ["val/precision$", "val/recall$"],
        },
    },
    LitTokenizer: {
        "reconstruction": {
            "loss of the tokenizer": ["train/loss$", "val/loss$"],
            "error of the images": ["val/l2$", "val/l1$"],
        },
        "codebook": {
            "share of the codes in use": ["val/codebook_usage$"],
            "share of the codes in use at each scale": ["codebook_usage/"],
        },
    },
}


# The columns that TensorBoard's table begins with: it has room for five, and a run has one group of names or the other.
FIRST = {
    *("global_batch", "optimizer.base_lr"),
    *("network.depth", "network.mixers", "network.width"),
    *("tokenizer.code_dim", "tokenizer.vocab_size"),
}
WITHOUT_EFFECT = {"activation_checkpointing", "compile", "max_skipped_steps"}  # on what is learned


class OverviewCallback(SaveConfigCallback):
    """Writes config.yaml, as Lightning's does, and costs.json, and shows the run as a whole in TensorBoard."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        kind, values = type(pl_module), hyperparameters(self.config, trainer, pl_module)
        if isinstance(pl_module, LitMVAR):
            costs = costs_of(pl_module.network_config)._asdict()
            values |= costs
            with atomic_path(Path(trainer.default_root_dir) / "costs.json") as path:
                path.write_text(json.dumps(costs, indent=2) + "\n")
        yaml = self.parser.dump(self.config, skip_none=False)
        summaries = [
            text("config", f"```yaml\n{yaml}\n```"),
            custom_scalars(layout(CHARTS[kind])),
            columns(values, METRICS[kind], FIRST),
            row(values),
        ]
        for writer in writers(trainer):
            for summary in summaries:
                writer._get_file_writer().add_summary(summary, BEFORE_TRAINING)


def hyperparameters(config: Namespace, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """Numbers, words and None by their name: of the model, and what else decides on a step of training."""
    model = {name: value for name, value in config.model.items() if name not in WITHOUT_EFFECT}
    lists = {name: ", ".join(map(str, value)) for name, value in model.items() if isinstance(value, list | tuple)}
    return {
        **model,
        **lists,
        "global_batch": cast(ScheduledModule, pl_module).global_batch,
        "devices": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": trainer.precision,
        "gradient_clip_val": trainer.gradient_clip_val,
        "max_steps": config.trainer.max_steps,
        "max_epochs": config.trainer.max_epochs,
        "seed": config.seed_everything,
    }


def layout(charts: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[Any]]]:
    """As TensorBoard's writer takes it: all curves of a chart as lines."""
    return {
        category: {title: ["Multiline", tags] for title, tags in group.items()} for category, group in charts.items()
    }
