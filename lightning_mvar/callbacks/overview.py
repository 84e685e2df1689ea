"""Overview of a run for its loggers: configuration, hyperparameters, and the layout of TensorBoard's charts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from torch.utils.tensorboard.summary import custom_scalars, text

from lightning_mvar.callbacks.loggers import log_configuration, write_text
from lightning_mvar.callbacks.tensorboard import BEFORE_TRAINING, survive_write_errors, writers
from lightning_mvar.io.hparams import columns_summary, row_summary
from lightning_mvar.io.json_files import write_json
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.costs import costs_of
from lightning_mvar.training.base import ScheduledModule
from lightning_mvar.training.freezing import trainable_parameters
from lightning_mvar.training.mvar import LitMVAR
from lightning_mvar.training.tokenizer import LitTokenizer

log = logging.getLogger(__name__)

# Metrics by which runs are compared; TensorBoard takes the last value of each.
METRICS: dict[type, list[str]] = {
    LitMVAR: ["val/loss", "val/fid", "val/mind", "val/is", "val/precision", "val/recall", "train/loss"],
    LitTokenizer: ["val/loss", "val/l2", "val/l1", "val/codebook_usage", "train/loss"],
}

# Charts by kind of run: {category: {title: regular expressions that tags match from their start}}.
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
            "Monge distance": ["val/mind$"],
            "kernel distance": ["val/kid$"],
            "precision and recall": ["val/precision$", "val/recall$"],
            "density and coverage": ["val/density$", "val/coverage$"],
        },
    },
    LitTokenizer: {
        "reconstruction": {
            "tokenizer loss": ["train/loss$", "val/loss$"],
            "reconstruction error": ["val/l2$", "val/l1$"],
        },
        "codebook": {
            "codebook usage": ["val/codebook_usage$"],
            "codebook usage of each scale": ["codebook_usage/"],
        },
    },
}


# First columns of TensorBoard's table, which shows five: each run has either the network's or the tokenizer's.
TABLE_COLUMNS = {
    *("global_batch", "optimizer.base_lr"),
    *("network.depth", "network.mixers", "network.width"),
    *("tokenizer.code_dim", "tokenizer.vocab_size"),
}
IRRELEVANT_OPTIONS = {"activation_checkpointing", "compile", "max_skipped_steps"}  # do not affect what is learned


class OverviewCallback(SaveConfigCallback):
    """Writes config.yaml to the folder of each logger (or the run's own, if none has one), costs.json, and an overview.

    Args:
        parser: see SaveConfigCallback; unused, because it would write resolved interpolations.
        config: the run's options, with resolved interpolations.
        yaml: content of config.yaml. It keeps interpolations, so that a new root folder applies to all paths in it.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, yaml: str) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.yaml = yaml

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for writer in writers(trainer):
            survive_write_errors(writer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        kind, values = type(pl_module), hyperparameters(self.config, trainer, pl_module)
        if isinstance(pl_module, LitMVAR):
            values.pop("network.schedule", None)  # named by its side lengths
            values |= network_values(pl_module.network_config)
            values["trainable_parameters"] = trainable_parameters(pl_module.network_config, pl_module.freeze_patterns)
            costs = costs_of(pl_module.network_config)._asdict()
            values |= costs
            write_json(Path(trainer.default_root_dir) / "costs.json", costs)
            log.info(
                "network of %s parameters, %s of them trained, %.3g GFLOPs per training image",
                *(f"{values[name]:,}" for name in ("parameters", "trainable_parameters")),
                values["flops_per_training_image"] / 1e9,
            )
        elif isinstance(pl_module, LitTokenizer):
            log.info("tokenizer of %s parameters", f"{sum(p.numel() for p in pl_module.tokenizer.parameters()):,}")
        log_configuration(trainer, self.yaml, values)
        log_dirs = [logger.log_dir for logger in trainer.loggers if logger.log_dir is not None]
        for folder in log_dirs or [trainer.default_root_dir]:
            write_text(Path(folder) / self.config_filename, self.yaml)
        summaries = [
            text("config", f"```yaml\n{self.yaml}\n```"),
            custom_scalars(chart_layout(CHARTS[kind])),
            columns_summary(values, METRICS[kind], TABLE_COLUMNS),
            row_summary(values),
        ]
        for writer in writers(trainer):
            for summary in summaries:
                writer._get_file_writer().add_summary(summary, BEFORE_TRAINING)


def hyperparameters(config: Namespace, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """Returns the hyperparameters of the model and of its training by name: numbers, strings or None."""
    model = {name: value for name, value in config.model.items() if name not in IRRELEVANT_OPTIONS}
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


def network_values(network: MVARConfig) -> dict[str, Any]:
    """Returns a network's hyperparameters, including those that its configuration leaves to tokenizer and data."""
    values = {f"network.{name}": value for name, value in vars(network).items() if name != "schedule"}
    sides = ", ".join(map(str, network.schedule.side_lengths))
    return values | {"network.mixers": ", ".join(map(str, network.mixers)), "network.schedule.side_lengths": sides}


def chart_layout(charts: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[Any]]]:
    """Returns the charts in the format of TensorBoard's writer, with all curves as lines."""
    return {
        category: {title: ["Multiline", tags] for title, tags in group.items()} for category, group in charts.items()
    }
